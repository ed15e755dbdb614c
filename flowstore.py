# SPDX-License-Identifier: MIT
# flowstore: a durable memory for workflows in one file. Copy it into your own tree; it needs nothing else.
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

A work item goes to one worker at a time, under a lease. `complete_work_item(item)` checks that the lease is
still this worker's, and whatever stands in the same `transaction()` happens with it or not at all:

    >>> _ = store.state.enqueue_work_item(WorkItem(execution_id="order-1", queue_type="mail"))
    >>> item = store.state.claim_work_item("worker-1", ["mail"])
    >>> with store.transaction():
    ...     done = store.state.complete_work_item(item)
    ...     sequence = store.events.append("order-1", "default", {"type": "custom", "mailed": True})
    >>> done.status, sequence
    (<WorkItemStatus.COMPLETED: 'completed'>, 3)
    >>> store.close(); folder.cleanup()

The chapters, each resting only on those above it:
    Errors        the whole tree under FlowStoreError
    Records       what goes in and out: enums and dataclasses
    Schema        the tables, one statement each
    Rows          values checked; the one mapper between records and rows
    Engine        SQLite: connections, transactions, group commit, waiting, fork
    Facets        FlowStore, EventStore, StateBackend, PersistenceProvider
    Store         what open() returns
    Command line  selftest, demo, bench, check, backup, compact
"""

from __future__ import annotations

import contextlib
import contextvars
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
import random
import re
import sqlite3
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import (
    TYPE_CHECKING, Any, ClassVar, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar, dataclass_transform, overload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from typing import NoReturn, TextIO
    from uuid import UUID

__version__ = "0.1.0"

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
R = TypeVar("R")
F = TypeVar("F", bound="_Facet")
P = ParamSpec("P")


# ============================================================================================================
# Errors: every failure a caller can meet, each with its facts as attributes
# ============================================================================================================

class FlowStoreError(Exception):
    """The root of all errors that this module raises on purpose."""

@dataclass_transform(eq_default=False)
class _Facts(FlowStoreError):
    """An error that is told by its attributes: they are its arguments, in order, and fill its message."""
    _says: ClassVar[str]
    def __init_subclass__(cls) -> None:
        dataclass(eq=False)(cls)

    def __post_init__(self) -> None:
        self.args = tuple(vars(self).values())

    def __str__(self) -> str:
        return self._says.format(**vars(self))

class NotFound(_Facts, LookupError):
    """The thing to change, or required to exist, is not there."""
    kind: str
    id: str
    _says = "{kind} {id!r} is not in the store"

class AlreadyExists(_Facts):
    """An id, a name or a unique key is taken."""
    kind: str
    id: str
    _says = "{kind} {id!r} is already taken"

class RevisionMismatch(_Facts):
    """A flow was changed since it was read. Source: FlowError::RevisionMismatch."""
    expected: int
    actual: int
    _says = ("revision {expected} is stale, the store has {actual}: "
             "read the flow again, or go on with the flow that the last update returned")

class SequenceConflict(_Facts):
    """The log of an execution is not at `expected_sequence`. Source: StateBackendError::SequenceConflict."""
    execution_id: str
    expected: int
    actual: int
    _says = ("the log of {execution_id!r} is at {actual}, not at {expected}: "
             "load the events after the one you know, then decide again")

class LeaseLost(_Facts):
    """The work item is not, or no longer, leased to this worker or fence."""
    item_id: str
    _says = "work item {item_id!r} is not leased under this claim: drop the work, another claim decides"

class IllegalTransition(_Facts):
    """A flow's status cannot change in this way."""
    id: str
    from_status: str
    to_status: str
    _says = "flow {id!r} cannot go from {from_status} to {to_status}"

class AlreadyTerminal(_Facts):
    """The flow has ended: nothing follows its status."""
    id: str
    status: str
    _says = "flow {id!r} is {status}: nothing follows"

class CancelPending(_Facts):
    """Cancelling was requested: the only status that may follow is cancelled."""
    id: str
    status: str
    _says = "flow {id!r} is {status} and to be cancelled: only cancelled may follow"

class TenantMismatch(_Facts):
    """An execution belongs to another tenant; `tenant_id` is the caller's."""
    execution_id: str
    tenant_id: str
    _says = "{execution_id!r} is not for tenant {tenant_id!r}"

class TenantInactive(_Facts):
    """A suspended or archived tenant may read, but not change anything."""
    tenant_id: str
    _says = "tenant {tenant_id!r} is not active: it may read, but change nothing"

class LimitExceeded(_Facts):
    """One of the tenant's limits is reached."""
    tenant_id: str
    _says = "a limit of tenant {tenant_id!r} is reached"

class InvalidData(FlowStoreError, ValueError):
    """A value cannot be stored; the message names the argument and the path in it."""

class StorageError(FlowStoreError):
    """The database failed; the driver's error is `__cause__`."""

class StoreBusy(StorageError):
    """Another process or transaction held the store for longer than `busy_timeout`; nothing was written."""

class StoreFull(StorageError):
    """The disk is full; nothing was written, and the store works again once there is room."""

class StoreCorrupt(StorageError):
    """The file is damaged, or is no database."""

class StoreClosed(StorageError):
    """The store was closed."""

class SchemaError(StorageError):
    """The tables in the database are not those this version works on."""


# ============================================================================================================
# Records: enums and dataclasses, grouped by facet
# ============================================================================================================

DEFAULT_TENANT = "default"
"""The tenant that is always registered."""

# What a record's annotations say beyond the Python type: chapter Rows finds the codec of a column by this name.
Id = str
Key = str
Data = str
Json = Any
AnyId: TypeAlias = "str | UUID"

def _random_bits(count: int) -> int:
    """Bits from the system: unlike a seeded generator, they differ on both sides of a fork."""
    return int.from_bytes(os.urandom((count + 7) // 8), "big") >> (-count % 8)

def new_id() -> str:
    """A new time-ordered UUIDv7 as text: new rows land at the right edge of their B-trees."""
    microseconds = time.time_ns() // 1000
    milliseconds, fraction = divmod(microseconds, 1000)
    number = milliseconds << 80 | 7 << 76 | (fraction * 4096 // 1000) << 64 | 2 << 62 | _random_bits(62)
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
class _Record:
    """What makes its children records: keyword-only dataclasses whose `repr` stays short however much they hold."""

    def __init_subclass__(cls, frozen: bool = False) -> None:
        dataclass(kw_only=True, repr=False, frozen=frozen)(cls)

    def __repr__(self) -> str:
        shown = []
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, spec.name)
            if value is None or value == spec.default or value in ("", [], {}):
                continue
            text = str(value) if isinstance(value, datetime) else repr(str(value) if isinstance(value, str) else value)
            shown.append(f"{spec.name}={text if len(text) <= 48 else text[:45] + '...'}")
        return f"{type(self).__name__}({', '.join(shown)})"

def _enum(kind: type[E], value: object, path: str) -> E:
    """The member of `kind` that a value is or spells."""
    try:
        if isinstance(value, str) and (type(value) is kind or not isinstance(value, enum.Enum)):
            return kind(value)
    except ValueError:
        pass
    raise InvalidData(f"{path}: {str(value)[:50]!r} is no {kind.__name__} ({', '.join(kind)})")

# --- flows (seed 001) ---
class FlowStatus(StrEnum):
    """Where a flow stands. Source: FlowStatus."""
    CREATED = "created"
    RUNNING = "running"
    WAITING = "waiting"
    CANCELLED = "cancelled"
    FINISHED = "finished"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """True when nothing follows this status."""
        return self in (FlowStatus.CANCELLED, FlowStatus.FINISHED, FlowStatus.FAILED)

    def can_transition_to(self, status: FlowStatus | str) -> bool:
        """True when a flow in this status may go to `status`; InvalidData for a word that is no status."""
        return _enum(FlowStatus, status, "status") in _FLOW_TRANSITIONS.get(self, ())

_FLOW_TRANSITIONS = {
    FlowStatus.CREATED: (FlowStatus.RUNNING, FlowStatus.CANCELLED),
    FlowStatus.RUNNING: (FlowStatus.WAITING, FlowStatus.FINISHED, FlowStatus.FAILED, FlowStatus.CANCELLED),
    FlowStatus.WAITING: (FlowStatus.RUNNING, FlowStatus.FAILED, FlowStatus.CANCELLED),
}

class StepRuntime(StrEnum):
    """Who runs a step. Source: StepRuntime."""
    MANAGED = "managed"
    MIRRORED = "mirrored"

class FlowStepStatus(StrEnum):
    """Where a step stands. Source: FlowStepStatus."""
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

class Flow(_Record):
    """A revision-checked record that one controller moves forward. Source: Flow."""
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
        """Set `status`, and nothing else, if it may follow the present one; the store itself checks no transition.

        Raises AlreadyTerminal, CancelPending, IllegalTransition. Source: Flow::transition_to."""
        now, then = _enum(FlowStatus, self.status, "status"), _enum(FlowStatus, status, "status")
        if now.is_terminal:
            raise AlreadyTerminal(self.id, now)
        if self.cancel_requested and then is not FlowStatus.CANCELLED:
            raise CancelPending(self.id, now)
        if not now.can_transition_to(then):
            raise IllegalTransition(self.id, now, then)
        self.status = then

    def request_cancel(self) -> None:
        """Set the sticky flag after which only cancelled may follow; no effect on a flow that has ended."""
        if not _enum(FlowStatus, self.status, "status").is_terminal:
            self.cancel_requested = True

class FlowStep(_Record):
    """One piece of a flow's work, found again by its run id. Steps have no revision. Source: FlowStep."""
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
    """One line of a flow's audit trail. Source: FlowEvent."""
    id: int
    flow_id: Id
    kind: str
    payload: Json
    at: datetime

# --- the execution log (seed 003) ---
class EventType(StrEnum):
    """The event types of the seed's crate; any other text is fine too. Source: ExecutionEventData."""
    EXECUTION_STARTED = "execution_started"
    STEP_STARTED = "step_started"
    STEP_COMPLETED = "step_completed"
    STEP_FAILED = "step_failed"
    EXECUTION_PAUSED = "execution_paused"
    EXECUTION_RESUMED = "execution_resumed"
    EXECUTION_COMPLETED = "execution_completed"
    EXECUTION_FAILED = "execution_failed"
    EXECUTION_CANCELLED = "execution_cancelled"
    ARTIFACT_STORED = "artifact_stored"
    STEP_DISCOVERED = "step_discovered"
    TOOL_CALL_STARTED = "tool_call_started"
    TOOL_CALL_COMPLETED = "tool_call_completed"
    CHECKPOINT_SAVED = "checkpoint_saved"
    GOAL_EVALUATED = "goal_evaluated"
    CUSTOM = "custom"

class StoredEvent(_Record, frozen=True):
    """One event as the log holds it: `sequence` within its execution, `position` within the whole log."""
    execution_id: Id
    sequence: int
    tenant_id: Id
    event: Json
    timestamp: datetime
    id: Id | None
    position: int

# --- the state backend (seeds 000 and 004) ---
class ExecutionStatus(StrEnum):
    """Where an execution stands. Source: jamjet_core::WorkflowStatus."""
    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LIMIT_EXCEEDED = "limit_exceeded"

    @property
    def is_terminal(self) -> bool:
        """True when the execution has ended."""
        return self not in (ExecutionStatus.PENDING, ExecutionStatus.RUNNING, ExecutionStatus.PAUSED)

class WorkItemStatus(StrEnum):
    """Where a work item stands."""
    PENDING = "pending"
    CLAIMED = "claimed"
    COMPLETED = "completed"
    FAILED = "failed"
    DEAD_LETTERED = "dead_lettered"

class TenantStatus(StrEnum):
    """Whether a tenant may change anything. Source: TenantStatus."""
    ACTIVE = "active"
    SUSPENDED = "suspended"
    ARCHIVED = "archived"

class WorkflowDefinition(_Record):
    """A compiled workflow, by id and version. Source: WorkflowDefinition."""
    workflow_id: Id
    version: str
    ir: Json
    created_at: datetime | None = None
    tenant_id: Id = DEFAULT_TENANT

class WorkflowExecution(_Record):
    """One run of a workflow and its current state. Source: WorkflowExecution."""
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
    """An execution's state as of one sequence of its log. Source: Snapshot."""
    execution_id: Id
    at_sequence: int
    state: Json
    id: Id = field(default_factory=new_id)
    created_at: datetime | None = None

class WorkItem(_Record):
    """One piece of work in a queue; while claimed, `lease_fence` says under which claim. Source: WorkItem."""
    execution_id: Id
    node_id: str = ""
    queue_type: Id
    payload: Json = field(default_factory=dict)
    attempt: int = 0
    max_attempts: int = 3
    id: Id = field(default_factory=new_id)
    created_at: datetime | None = None
    available_at: datetime | None = None
    lease_expires_at: datetime | None = None
    worker_id: Id | None = None
    lease_fence: int = 0
    status: WorkItemStatus = WorkItemStatus.PENDING
    last_error: str | None = None
    tenant_id: Id = DEFAULT_TENANT

class DeadLetter(_Record, frozen=True):
    """A work item that will not be tried again by itself, with its last error."""
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

class ReclaimResult(_Record, frozen=True):
    """What became of the items whose lease had expired. Source: ReclaimResult."""
    retryable: list[WorkItem] = field(default_factory=list)
    exhausted: list[DeadLetter] = field(default_factory=list)

class ApiToken(_Record, frozen=True):
    """What the store knows of a token: never its plaintext. Source: ApiToken."""
    id: Id
    name: str
    role: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    tenant_id: Id

class TenantLimits(_Record):
    """A tenant's limits, None for none. The store enforces the first two, the others are the caller's."""
    max_concurrent_executions: int | None = None
    max_workflows: int | None = None
    max_tokens_per_month: int | None = None
    max_cost_per_month_usd: float | None = None

class Tenant(_Record):
    """One tenant. Source: Tenant."""
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

# --- workflow persistence (seed 002) ---
class WorkflowStatus(StrEnum):
    """Where a workflow instance stands. Source: wfe_core::WorkflowStatus."""
    RUNNABLE = "Runnable"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    TERMINATED = "Terminated"

class PointerStatus(StrEnum):
    """Where one step of a workflow instance stands. Source: wfe_core::PointerStatus."""
    PENDING = "Pending"
    RUNNING = "Running"
    COMPLETE = "Complete"
    SKIPPED = "Skipped"
    SLEEPING = "Sleeping"
    WAITING_FOR_EVENT = "WaitingForEvent"
    FAILED = "Failed"
    COMPENSATED = "Compensated"
    CANCELLED = "Cancelled"
    PENDING_PREDECESSOR = "PendingPredecessor"

class CommandName(StrEnum):
    """What a scheduled command asks for. Source: wfe_core::CommandName."""
    PROCESS_WORKFLOW = "ProcessWorkflow"
    PROCESS_EVENT = "ProcessEvent"

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
    event_name: str | None = None
    event_key: str | None = None
    event_published: bool = False
    event_data: Json | None = None
    step_name: str | None = None
    retry_count: int = 0
    children: list[str] = field(default_factory=list)
    context_item: Json | None = None
    predecessor_id: Id | None = None
    outcome: Json | None = None
    scope: list[str] = field(default_factory=list)
    extension_attributes: dict[str, Any] = field(default_factory=dict)

class WorkflowInstance(_Record):
    """One run of a workflow definition with its pointers; `next_execution` is epoch milliseconds, None for never."""
    id: Id = field(default_factory=new_id)
    name: Key = ""
    workflow_definition_id: Key
    version: int = 1
    description: str | None = None
    reference: str | None = None
    root_workflow_id: Id | None = None
    execution_pointers: list[ExecutionPointer] = field(default_factory=list)
    next_execution: int | datetime | None = 0
    status: WorkflowStatus = WorkflowStatus.RUNNABLE
    data: Json = field(default_factory=dict)
    create_time: datetime | None = None
    complete_time: datetime | None = None

class Event(_Record):
    """Something that happened, for subscriptions to pick up. Source: wfe_core::Event."""
    id: Id = field(default_factory=new_id)
    event_name: Key
    event_key: Key
    event_data: Json | None = None
    event_time: datetime | None = None
    is_processed: bool = False

class EventSubscription(_Record):
    """A step that waits for an event, with the token of the host that handles it. Source: EventSubscription."""
    id: Id = field(default_factory=new_id)
    workflow_id: Id
    step_id: int
    execution_pointer_id: Id
    event_name: Key
    event_key: Key
    subscribe_as_of: datetime | None = None
    subscription_data: Json | None = None
    external_token: str | None = None
    external_worker_id: str | None = None
    external_token_expiry: datetime | None = None

class ScheduledCommand(_Record):
    """A command that becomes due at `execute_time`, epoch milliseconds. Source: ScheduledCommand."""
    command_name: CommandName
    data: Data
    execute_time: int | datetime

class ExecutionError(_Record, frozen=True):
    """One failure of a step, as the log of errors keeps it: a record, no exception. Source: ExecutionError."""
    workflow_id: Id
    execution_pointer_id: Id
    message: str
    error_time: datetime | None = None


# ============================================================================================================
# Schema: the tables, one statement each, in words that SQLite and PostgreSQL share
# ============================================================================================================

# Times are integer microseconds since the epoch, JSON is text. Tables that a seed names keep that name; the others
# are `flowstore_...`, since the user's own tables may share the file. The partial indexes of the queue begin with the
# status that they are about: one column more to match is what makes SQLite prefer them to the full ones. The two tables
# that every append looks into are WITHOUT ROWID: one seek less.
_SCHEMA_VERSION = 1

_TABLES = """
CREATE TABLE flowstore_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE flows (
    id TEXT PRIMARY KEY, controller_id TEXT NOT NULL, goal TEXT NOT NULL, owner_session_key TEXT NOT NULL,
    requester_origin TEXT NOT NULL, current_step TEXT NOT NULL, state TEXT NOT NULL, wait TEXT, status TEXT NOT NULL,
    cancel_requested INTEGER NOT NULL, revision INTEGER NOT NULL, created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL);
CREATE INDEX flows_by_owner ON flows (owner_session_key, created_at, id);
CREATE INDEX flows_by_status ON flows (status, updated_at, id);
CREATE TABLE flow_steps (
    id TEXT PRIMARY KEY, flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE, runtime TEXT NOT NULL,
    child_session_key TEXT, run_id TEXT NOT NULL, task TEXT NOT NULL, status TEXT NOT NULL, result TEXT,
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, UNIQUE (flow_id, run_id));
CREATE INDEX flow_steps_by_flow ON flow_steps (flow_id, created_at, id);
CREATE TABLE flow_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE,
    kind TEXT NOT NULL, payload TEXT NOT NULL, at INTEGER NOT NULL);
CREATE INDEX flow_events_by_flow ON flow_events (flow_id, id);
CREATE TABLE flowstore_tenants (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, policy TEXT, limits TEXT NOT NULL,
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX flowstore_tenants_by_time ON flowstore_tenants (created_at, id);
CREATE TABLE flowstore_tokens (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, hash TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER, tenant_id TEXT NOT NULL);
CREATE INDEX flowstore_tokens_by_time ON flowstore_tokens (created_at, id);
CREATE INDEX flowstore_tokens_by_tenant ON flowstore_tokens (tenant_id, created_at, id);
CREATE TABLE flowstore_executions (
    execution_id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL, created_at INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX flowstore_executions_by_tenant ON flowstore_executions (tenant_id, created_at, execution_id);
CREATE TABLE flowstore_log (
    position INTEGER PRIMARY KEY, execution_id TEXT NOT NULL, sequence INTEGER NOT NULL, tenant_id TEXT NOT NULL,
    event TEXT NOT NULL, timestamp INTEGER NOT NULL, event_id TEXT, UNIQUE (execution_id, sequence));
CREATE INDEX flowstore_log_by_tenant ON flowstore_log (tenant_id, position);
CREATE UNIQUE INDEX flowstore_log_by_event_id ON flowstore_log (execution_id, event_id) WHERE event_id IS NOT NULL;
CREATE TABLE flowstore_runs (
    execution_id TEXT PRIMARY KEY, workflow_id TEXT NOT NULL, workflow_version TEXT NOT NULL, status TEXT NOT NULL,
    initial_input TEXT NOT NULL, current_state TEXT NOT NULL, started_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL, completed_at INTEGER, tenant_id TEXT NOT NULL);
CREATE INDEX flowstore_runs_by_time ON flowstore_runs (updated_at, execution_id);
CREATE INDEX flowstore_runs_by_status ON flowstore_runs (status, updated_at, execution_id);
CREATE INDEX flowstore_runs_by_tenant ON flowstore_runs (tenant_id, updated_at, execution_id);
CREATE INDEX flowstore_runs_by_tenant_status ON flowstore_runs (tenant_id, status, updated_at, execution_id);
CREATE TABLE flowstore_snapshots (
    execution_id TEXT NOT NULL, at_sequence INTEGER NOT NULL, state TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL, tenant_id TEXT NOT NULL, PRIMARY KEY (execution_id, at_sequence));
CREATE TABLE flowstore_work_items (
    id TEXT PRIMARY KEY, execution_id TEXT NOT NULL, node_id TEXT NOT NULL, queue_type TEXT NOT NULL,
    payload TEXT NOT NULL, attempt INTEGER NOT NULL, max_attempts INTEGER NOT NULL, created_at INTEGER NOT NULL,
    available_at INTEGER NOT NULL, lease_expires_at INTEGER, worker_id TEXT, lease_fence INTEGER NOT NULL,
    status TEXT NOT NULL, last_error TEXT, tenant_id TEXT NOT NULL, dead_lettered_at INTEGER);
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
CREATE TABLE flowstore_definitions (
    workflow_id TEXT NOT NULL, version TEXT NOT NULL, ir TEXT NOT NULL, created_at INTEGER NOT NULL,
    tenant_id TEXT NOT NULL, PRIMARY KEY (tenant_id, workflow_id, version));
CREATE TABLE flowstore_effects (
    tenant_id TEXT NOT NULL, key TEXT NOT NULL, result TEXT NOT NULL, execution_id TEXT, PRIMARY KEY (tenant_id, key));
CREATE INDEX flowstore_effects_by_execution ON flowstore_effects (execution_id);
CREATE TABLE flowstore_artifacts (
    tenant_id TEXT NOT NULL, hash TEXT NOT NULL, size INTEGER NOT NULL, media_type TEXT, data BLOB NOT NULL,
    PRIMARY KEY (tenant_id, hash));
CREATE TABLE workflows (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, workflow_definition_id TEXT NOT NULL, version INTEGER NOT NULL,
    description TEXT, reference TEXT, root_workflow_id TEXT, next_execution INTEGER, status TEXT NOT NULL,
    data TEXT NOT NULL, create_time INTEGER NOT NULL, complete_time INTEGER, stamp INTEGER NOT NULL);
CREATE INDEX workflows_runnable ON workflows (status, next_execution, id)
    WHERE status = 'Runnable' AND next_execution IS NOT NULL;
CREATE INDEX workflows_by_age ON workflows (status, (COALESCE(complete_time, create_time)), id);
CREATE TABLE execution_pointers (
    workflow_id TEXT NOT NULL REFERENCES workflows (id) ON DELETE CASCADE, place INTEGER NOT NULL, id TEXT NOT NULL,
    step_id INTEGER NOT NULL, active INTEGER NOT NULL, status TEXT NOT NULL, sleep_until INTEGER,
    persistence_data TEXT, start_time INTEGER, end_time INTEGER, event_name TEXT, event_key TEXT,
    event_published INTEGER NOT NULL, event_data TEXT, step_name TEXT, retry_count INTEGER NOT NULL,
    children TEXT NOT NULL, context_item TEXT, predecessor_id TEXT, outcome TEXT, scope TEXT NOT NULL,
    extension_attributes TEXT NOT NULL, PRIMARY KEY (workflow_id, id));
CREATE INDEX execution_pointers_in_order ON execution_pointers (workflow_id, place, id);
CREATE TABLE events (
    id TEXT PRIMARY KEY, event_name TEXT NOT NULL, event_key TEXT NOT NULL, event_data TEXT,
    event_time INTEGER NOT NULL, is_processed INTEGER NOT NULL);
CREATE INDEX events_by_key ON events (event_name, event_key, event_time, id);
CREATE INDEX events_runnable ON events (event_time, id) WHERE is_processed = 0;
CREATE INDEX events_processed ON events (event_time, id) WHERE is_processed = 1;
CREATE TABLE event_subscriptions (
    id TEXT PRIMARY KEY, workflow_id TEXT NOT NULL, step_id INTEGER NOT NULL, execution_pointer_id TEXT NOT NULL,
    event_name TEXT NOT NULL, event_key TEXT NOT NULL, subscribe_as_of INTEGER NOT NULL, subscription_data TEXT,
    external_token TEXT, external_worker_id TEXT, external_token_expiry INTEGER, terminated_at INTEGER);
CREATE INDEX event_subscriptions_open ON event_subscriptions (event_name, event_key, subscribe_as_of, id)
    WHERE terminated_at IS NULL;
CREATE INDEX event_subscriptions_by_workflow ON event_subscriptions (workflow_id);
CREATE INDEX event_subscriptions_ended ON event_subscriptions (terminated_at, id) WHERE terminated_at IS NOT NULL;
CREATE TABLE scheduled_commands (
    command_name TEXT NOT NULL, data TEXT NOT NULL, execute_time INTEGER NOT NULL, again_at INTEGER, lease_token TEXT,
    lease_expires_at INTEGER, PRIMARY KEY (command_name, data));
CREATE INDEX scheduled_commands_by_time ON scheduled_commands (execute_time, command_name, data);
CREATE TABLE execution_errors (
    id INTEGER PRIMARY KEY AUTOINCREMENT, workflow_id TEXT NOT NULL, execution_pointer_id TEXT NOT NULL,
    message TEXT NOT NULL, error_time INTEGER NOT NULL);
CREATE INDEX execution_errors_by_workflow ON execution_errors (workflow_id, id);
CREATE INDEX execution_errors_by_time ON execution_errors (error_time, id);
CREATE TABLE flowstore_counters (definition_id TEXT PRIMARY KEY, value INTEGER NOT NULL)
"""

_TABLE_NAMES = tuple(re.findall(r"CREATE TABLE (\w+)", _TABLES))

# From version N to N + 1, each a script of statements; all of them run in the transaction that finds the file old.
_UPGRADES: dict[int, str] = {}

def _statements(script: str) -> list[str]:
    return [statement.strip() for statement in script.split(";") if statement.strip()]


# ============================================================================================================
# Rows: values checked, and the one mapper between records and rows
# ============================================================================================================

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST_TIME = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST_TIME = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_INT_MAX = 2**63 - 1
_JSON_DEPTH = 256

_encoder = json.JSONEncoder(check_circular=False, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_encode_json: Callable[[Any], str] = _encoder.encode
if make_encoder := getattr(json.encoder, "c_make_encoder", None):
    # What encode() makes anew for each value, made once: half its time. A circle ends as a RecursionError.
    _chunks = make_encoder(None, _encoder.default, json.encoder.encode_basestring, None, ":", ",", False, False, False)
    _encode_json = lambda value: "".join(_chunks(value, 0))  # noqa: E731
_of_json = json.JSONDecoder().decode

def _text(value: object, path: str) -> str:
    """Any text that a database can hold: no NUL, no lone surrogates."""
    if not isinstance(value, str):
        raise InvalidData(f"{path}: text is needed, not {type(value).__name__}")
    if "\0" in value:
        raise InvalidData(f"{path}: text cannot hold NUL")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidData(f"{path}: text cannot hold a lone surrogate") from None
    return value if type(value) is str else str.__str__(value)

def _short(value: object, path: str, most: int, least: int = 0) -> str:
    text = _text(value, path)
    if not least <= len(text) <= most:
        raise InvalidData(f"{path}: {least} to {most} characters are needed, not {len(text)}")
    return text

def _id(value: object, path: str) -> str:
    if type(value) is str and 0 < len(value) <= 255 and value.isascii() and "\0" not in value:
        return value  # nearly every id, and this is asked on every call
    if not isinstance(value, str) and value.__class__.__name__ == "UUID" and hasattr(value, "hex"):
        return str(value)
    return _short(value, path, 255, 1)

def _key(value: object, path: str) -> str:
    return _short(value, path, 255)

def _int(value: object, path: str, least: int = -_INT_MAX - 1, most: int = _INT_MAX) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidData(f"{path}: a whole number is needed, not {type(value).__name__}")
    if not least <= value <= most:
        raise InvalidData(f"{path}: a number from {least} to {most} is needed")
    return int(value)

def _bool(value: object, path: str) -> int:
    if not isinstance(value, bool):
        raise InvalidData(f"{path}: True or False is needed, not {type(value).__name__}")
    return int(value)

def _count(value: object, path: str) -> int:
    """A limit, an offset, a number to keep: below 0 counts as 0."""
    return max(0, _int(value, path))

def _limit(value: object, path: str = "limit") -> int:
    return _INT_MAX if value is None else _count(value, path)

def _seconds(value: object, path: str) -> float:
    """A finite span in seconds; below 0 counts as 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidData(f"{path}: a number of seconds is needed, not {type(value).__name__}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise InvalidData(f"{path}: a finite number of seconds is needed")
    return max(0.0, seconds)

def _time(value: object, path: str) -> int:
    if not isinstance(value, datetime):
        raise InvalidData(f"{path}: an aware datetime is needed, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise InvalidData(f"{path}: the datetime has no time zone; pass an aware one")
    microseconds = (value - _EPOCH) // _MICROSECOND
    if not _FIRST_TIME <= microseconds <= _LAST_TIME:
        raise InvalidData(f"{path}: the time lies outside the years 1 to 9999 in UTC")
    return microseconds

def _datetime(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)

def _after(now: int, seconds: float, path: str) -> int:
    """The time `seconds` after `now`, both in microseconds."""
    if seconds > (_LAST_TIME - now) / 1e6:
        raise InvalidData(f"{path}: the time would lie beyond the year 9999")
    return now + round(seconds * 1e6)

def _milliseconds(value: object, path: str) -> int:
    """The seed's millisecond fields: a whole number, or an aware datetime."""
    return _time(value, path) // 1000 if isinstance(value, datetime) else _int(value, path)

def _json(value: object, path: str) -> str:
    """The text of a JSON value; InvalidData names the place in it that is none."""
    try:
        text = _encode_json(value)
        if not text.isascii():
            text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        place, reason = _why_no_json(value, path)
        raise InvalidData(f"{place}: {reason or error}") from None
    # Deeper than that is only possible with more brackets than that; most texts have far fewer.
    if text.count("[") + text.count("{") > _JSON_DEPTH:
        place, reason = _why_no_json(value, path)
        if reason:
            raise InvalidData(f"{place}: {reason}")
    return text

def _why_no_json(value: object, path: str) -> tuple[str, str]:
    """Where and why a value is no JSON; the reason is empty when it is."""
    waiting: list[tuple[Any, str, int]] = [(value, path, 0)]
    while waiting:
        value, path, depth = waiting.pop()
        reason = ""
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                reason = "text cannot hold a lone surrogate"
        elif isinstance(value, float):
            reason = "" if math.isfinite(value) else f"{value} is not JSON"
        elif isinstance(value, int):  # bool too
            reason = "" if abs(value) < 10**4300 else "a number of at most 4,300 digits is needed"
        elif isinstance(value, (list, tuple, dict)):
            if depth == _JSON_DEPTH:
                return path[:200], f"nested deeper than {_JSON_DEPTH} levels"
            if isinstance(value, dict):
                for key in value:
                    if key is not None and not isinstance(key, (str, int, float)):
                        return path, f"a key of type {type(key).__name__} is not JSON"
                    if why := _why_no_json(key, "")[1]:
                        return f"{path}, a key of it", why
                waiting += [(member, f"{path}.{key}", depth + 1) for key, member in value.items()]
            else:
                waiting += [(member, f"{path}[{index}]", depth + 1) for index, member in enumerate(value)]
        elif value is not None:
            reason = f"{type(value).__name__} is not JSON"
        if reason:
            return path, reason
    return path, ""

def _object(value: object, path: str) -> str:
    if not isinstance(value, dict):
        raise InvalidData(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return _json(value, path)

def _texts(value: object, path: str) -> str:
    if not isinstance(value, (list, tuple)):
        raise InvalidData(f"{path}: a list of text is needed, not {type(value).__name__}")
    return _encode_json([_text(member, f"{path}[{index}]") for index, member in enumerate(value)])

def _limits(value: object, path: str) -> str:
    """A tenant's limits as JSON: numbers that are not negative, or None."""
    limits = _is(TenantLimits, value, path)
    for name, limit in vars(limits).items():
        if limit is not None and name == "max_cost_per_month_usd":
            if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 <= limit < math.inf:
                raise InvalidData(f"{path}.{name}: an amount of 0 or more is needed")
        elif limit is not None:
            _int(limit, f"{path}.{name}", 0)
    return _json(vars(limits), path)

def _is(kind: type[T], value: object, path: str) -> T:
    if not isinstance(value, kind):
        raise InvalidData(f"{path}: a {kind.__name__} is needed, not {type(value).__name__}")
    return value

# How each type that a record's fields are annotated with goes into a column, and comes out of it.
_CODECS: dict[str, tuple[Callable[[Any, str], Any], Callable[[Any], Any] | None]] = {
    "Id": (_id, None),
    "Key": (_key, None),
    "Data": (lambda value, path: _short(value, path, 512), None),
    "str": (_text, None),
    "int": (_int, None),
    "bool": (_bool, bool),
    "datetime": (_time, _datetime),
    "int | datetime": (_milliseconds, None),
    "Json": (_json, _of_json),
    "list[str]": (_texts, _of_json),
    "dict[str, Any]": (_object, _of_json),
    "TenantLimits": (_limits, lambda text: TenantLimits(**_of_json(text))),
}

def _codec(annotation: str) -> tuple[Callable[[Any, str], Any], Callable[[Any], Any] | None]:
    if annotation in _CODECS:
        return _CODECS[annotation]
    kind = globals()[annotation]
    return (lambda value, path: str(_enum(kind, value, path))), kind

class _Mapper(Generic[T]):
    """What turns one type of record into column values and back: its fields' annotations decide how."""

    def __init__(self, record: type[T], *, without: tuple[str, ...] = (), named: Mapping[str, str] | None = None):
        specs = [spec for spec in dataclasses.fields(record) if spec.name not in without]  # type: ignore[arg-type]
        self.record = record
        self.fields = tuple(spec.name for spec in specs)
        self.names = tuple((named or {}).get(name, name) for name in self.fields)
        self.columns = ", ".join(self.names)
        self._encoders: list[tuple[str, str, Callable[[Any, str], Any], bool]] = []
        self._decoders: list[tuple[int, Callable[[Any], Any]]] = []
        for index, (spec, column) in enumerate(zip(specs, self.names, strict=True)):
            encode, decode = _codec(str(spec.type).removesuffix(" | None"))
            # Times that are None are filled by the store's clock when they are written.
            optional = str(spec.type).endswith(" | None")
            self._encoders.append((spec.name, column, encode, optional))
            if decode is not None:
                self._decoders.append((index, decode))

    def insert(self, table: str, *more: str) -> str:
        """INSERT of all columns, and of `more`, that inserts nothing where a unique key is taken."""
        names = (*self.names, *more)
        return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) ON CONFLICT DO NOTHING"

    def update(self, table: str, *kept: str) -> str:
        """UPDATE by id of all columns but those `kept`: their values in the columns' order, then the id."""
        names = [f"{name} = ?" for name in self.names if name not in ("id", *kept)]
        return f"UPDATE {table} SET {', '.join(names)} WHERE id = ?"

    def select(self, rest: str) -> str:
        """SELECT of all columns from what `rest` says."""
        return f"SELECT {self.columns} FROM {rest}"

    def encode(self, record: object, path: str = "", *, argument: str = "") -> dict[str, Any]:
        """Column values by column; InvalidData names the field."""
        _is(self.record, record, argument or self.record.__name__)
        values = {}
        for name, column, encode, optional in self._encoders:
            value = getattr(record, name)
            values[column] = None if optional and value is None else encode(value, f"{path}{name}")
        return values

    def decode(self, row: Iterable[Any]) -> T:
        """The record of one row, its columns in the order of `columns`."""
        values = list(row)
        try:
            for index, decode in self._decoders:
                if (value := values[index]) is not None:
                    values[index] = decode(value)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise StoreCorrupt(f"a stored {self.record.__name__} cannot be read: {error}") from error
        record = object.__new__(self.record)
        record.__dict__.update(zip(self.fields, values, strict=True))  # past __init__: half the time of loading a log
        return record

    def maybe(self, row: Iterable[Any] | None) -> T | None:
        """The record of a row, None without one."""
        return None if row is None else self.decode(row)

    def decode_all(self, rows: Iterable[tuple[Any, ...]]) -> list[T]:
        """The records of many rows."""
        return [self.decode(row) for row in rows]

_FLOW = _Mapper(Flow)
_STEP = _Mapper(FlowStep)
_FLOW_EVENT = _Mapper(FlowEvent)
_STORED = _Mapper(StoredEvent, named={"id": "event_id"})
_DEFINITION = _Mapper(WorkflowDefinition)
_RUN = _Mapper(WorkflowExecution)
_SNAPSHOT = _Mapper(Snapshot)
_ITEM = _Mapper(WorkItem)
_DEAD = _Mapper(DeadLetter)
_TOKEN = _Mapper(ApiToken)
_TENANT = _Mapper(Tenant)
_ARTIFACT = _Mapper(ArtifactRef)
_INSTANCE = _Mapper(WorkflowInstance, without=("execution_pointers",))
_POINTER = _Mapper(ExecutionPointer)
_EVENT = _Mapper(Event)
_SUBSCRIPTION = _Mapper(EventSubscription)
_COMMAND = _Mapper(ScheduledCommand)
_ERROR = _Mapper(ExecutionError)


# ============================================================================================================
# Engine: SQLite connections, transactions, group commit, waiting, fork
# ============================================================================================================

_WAL_BOUND = 16 << 20
_GROUP_MOST = 1000  # operations in one commit: enough to hide the fsync, few enough to keep each transaction short
_TICK = 0.02  # how often a waiter looks for what other processes wrote
_IDLE_READERS = 8

def _failure(error: Exception) -> FlowStoreError:
    """The error that callers see for one of the driver."""
    if isinstance(error, (OverflowError, UnicodeError)):
        return InvalidData(f"the value cannot be stored: {error}")
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusy("the store is held by another transaction: try again, or open it with a longer busy_timeout")
    if code == sqlite3.SQLITE_FULL:
        return StoreFull("the disk is full, nothing was written: make room and try again")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreCorrupt(f"the file is damaged or not an SQLite database ({error}): restore it from a backup")
    if code == sqlite3.SQLITE_TOOBIG or isinstance(error, sqlite3.DataError):
        return InvalidData(f"the value is too large to be stored: {error}")
    if code == sqlite3.SQLITE_READONLY:
        return StorageError(f"the database cannot be written: {error}")
    return StorageError(f"the database failed: {error}")

# What sqlite3 raises for a statement; values that it cannot bind raise the last three.
_DRIVER_ERRORS = (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError, TypeError)

class _Tx:
    """One connection as operations see it: rows in, rows out, the driver's errors as ours."""
    __slots__ = ("_clock", "db")

    def __init__(self, db: sqlite3.Connection, clock: Callable[[], datetime] | None) -> None:
        self.db = db
        self._clock = clock

    def rows(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        """All rows of a statement: a cursor left half read would hold its snapshot open."""
        try:
            return self.db.execute(sql, params).fetchall()
        except _DRIVER_ERRORS as error:
            raise _failure(error) from error

    def row(self, sql: str, *params: Any) -> tuple[Any, ...] | None:
        """The first row of a statement, or None."""
        rows = self.rows(sql, *params)
        return rows[0] if rows else None

    def run(self, sql: str, *params: Any) -> int:
        """Execute a statement; how many rows it wrote."""
        try:
            return self.db.execute(sql, params).rowcount
        except _DRIVER_ERRORS as error:
            raise _failure(error) from error

    def run_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """Execute a statement for each of the rows."""
        try:
            return self.db.executemany(sql, rows).rowcount
        except _DRIVER_ERRORS as error:
            raise _failure(error) from error

    def now(self) -> int:
        """The store's time in microseconds."""
        return time.time_ns() // 1000 if self._clock is None else _time(self._clock(), "clock()")

def _add_tenant(tx: _Tx, tenant_id: str) -> None:
    """Register a tenant of which only the id is known."""
    now = tx.now()
    values = {**_TENANT.encode(Tenant(id=tenant_id)), "created_at": now, "updated_at": now}
    tx.run(_TENANT.insert("flowstore_tenants"), *values.values())

class _Connection:
    """One SQLite connection under a lock of its own; opened at its first use, and again after a fork."""

    def __init__(self, connect: Callable[[], sqlite3.Connection], clock: Callable[[], datetime] | None) -> None:
        self.lock = threading.RLock()
        self.tx: _Tx | None = None
        self.wal = -1  # of the writer: a descriptor of the write-ahead log, to see how large it is
        self.lent = False  # to a call or a block, on a server
        self._connect = connect
        self._clock = clock

    def use(self) -> _Tx:
        """The open connection; the caller holds the lock."""
        if self.tx is None:
            try:
                self.tx = _Tx(self._connect(), self._clock)
            except _DRIVER_ERRORS as error:
                raise _failure(error) from error
        return self.tx

    @property
    def in_transaction(self) -> bool:
        """True while a transaction is open on it."""
        return self.tx is not None and self.tx.db.in_transaction

    def close(self) -> None:
        """Close; what is not committed is rolled back."""
        tx, wal, self.tx, self.wal = self.tx, self.wal, None, -1
        if wal >= 0:
            os.close(wal)
        if tx is not None:
            tx.db.close()

    __del__ = close  # of a store that was dropped without close(): a descriptor does not close itself

class _Operation(Generic[F, P, R]):
    """A facet's method over an open transaction, seen from outside as a method that runs it in one.

    `writes` operations may run more than once (a group begun again), so they have no effect outside `tx`; `snapshot`
    reads have several statements and run them on one state of the database. Each race of a `row` write is closed by one
    conditional statement or the lock on a row: where writers run side by side, it needs no more isolation."""

    def __init__(
        self, function: Callable[Concatenate[F, _Tx, P], R], writes: bool, snapshot: bool = False, row: bool = False
    ) -> None:
        self.function = function
        self.writes = writes
        self.snapshot = snapshot
        self.row = row
        self.name = function.__name__
        self.__doc__ = function.__doc__
        signature = inspect.signature(function)
        own, _, *rest = signature.parameters.values()
        self._bound_signature = signature.replace(parameters=rest)

        @functools.wraps(function)
        def method(facet: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(facet, self.name)(*args, **kwargs)

        del method.__wrapped__
        method.__signature__ = signature.replace(parameters=[own, *rest])  # type: ignore[attr-defined]
        self._method = method

    @overload
    def __get__(self, facet: None, owner: Any) -> Callable[..., Any]: ...
    @overload
    def __get__(self, facet: F, owner: Any = None) -> Callable[P, R]: ...
    def __get__(self, facet: Any, owner: Any = None) -> Callable[..., Any]:
        """The method of one facet: made once, then found in the facet's own attributes."""
        if facet is None:
            return self._method
        run = facet._run

        def bound(*args: Any, **kwargs: Any) -> Any:
            return run(self, facet, args, kwargs)

        functools.update_wrapper(bound, self._method)
        bound.__signature__ = self._bound_signature  # type: ignore[attr-defined]
        facet.__dict__[self.name] = bound
        return bound

    def run(self, facet: Any, tx: _Tx, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it in an open transaction, if the facet's tenant may."""
        if facet._tenant is not None:
            facet._admit(tx, self.writes)
        return self.function(facet, tx, *args, **kwargs)

def _write(function: Callable[Concatenate[F, _Tx, P], R]) -> _Operation[F, P, R]:
    """An operation that changes something: one atomic, durable transaction."""
    return _Operation(function, writes=True)

def _write_row(function: Callable[Concatenate[F, _Tx, P], R]) -> _Operation[F, P, R]:
    """A write that one conditional statement or the lock on a row protects: claim, renew, settle, retry, hold."""
    return _Operation(function, writes=True, row=True)

def _read(function: Callable[Concatenate[F, _Tx, P], R]) -> _Operation[F, P, R]:
    """An operation of one reading statement."""
    return _Operation(function, writes=False)

def _snapshot(function: Callable[Concatenate[F, _Tx, P], R]) -> _Operation[F, P, R]:
    """An operation of several reading statements, all of them on one state of the database."""
    return _Operation(function, writes=False, snapshot=True)

class _Call:
    """One caller that wants the writer: with an operation, or (`operation` None) for itself alone."""
    gate: threading.Lock | None = None
    deadline = 0.0
    result: Any = None
    error: BaseException | None = None
    done = False  # result or error hold what became of it
    taken = False  # in a leader's group: it no longer times out
    running = False  # as leader: its transaction has begun
    held_up = False  # as leader: another process has the file
    abandoned = False  # its thread has gone on, or the block that held the transaction is gone

    def __init__(self, operation: _Operation[Any, Any, Any] | None, facet: Any, args: Any, kwargs: Any) -> None:
        self.operation = operation
        self.facet = facet
        self.args = args
        self.kwargs = kwargs
        self.thread = threading.get_ident()

    def wake(self) -> None:
        """Let its thread look at the shared state again; doing so twice does no harm."""
        if self.gate is not None:
            with contextlib.suppress(RuntimeError):
                self.gate.release()

@dataclass(frozen=True)
class _Options:
    """What open() was asked for."""
    synchronous: str
    busy_timeout: float
    lease_seconds: float
    backoff: Callable[[int], float] | None
    clock: Callable[[], datetime] | None
    read_only: bool

# The innermost open transaction block of this thread or task, one per engine. Tasks inherit it from the task that
# starts them; it is held weakly, so that a block whose end was never run can be noticed and rolled back.
_blocks: contextvars.ContextVar[tuple[weakref.ref[_Block], ...]] = contextvars.ContextVar("flowstore", default=())

class _Engine:
    """One SQLite database: a writer that callers share by group commit, and a stack of readers.

    A durable commit costs one fsync, whatever it carries. The caller that finds the writer free leads: it begins a
    transaction, takes every operation that queued meanwhile, runs them all, commits, wakes their callers and hands
    the lead to the first that has queued since. `lead`, `queue` and the calls in them change only under `mutex`.
    Whoever holds a connection's lock may take the mutex, never the other way round."""

    tick = _TICK
    ddl: Callable[[str], str] = str  # how the engine words the schema

    def __init__(self, target: str, path: str | None, options: _Options) -> None:
        self.target = target
        self.path = path  # None: in memory
        self.options = options
        self.mutex = threading.RLock()
        self.lead: _Call | None = None
        self.queue: deque[_Call] = deque()
        self.group: list[_Call] = []
        self.outcome: list[object] = []  # not empty: the group's COMMIT has succeeded
        self.closed = False
        self.commits = 0
        self.watching: set[threading.Lock] = set()
        self.checkpoint_at = _WAL_BOUND
        self.breath = 0.0
        self.connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self.writer = self._new_connection()
        self.readers: list[_Connection] = []
        self._held: list[_Connection] = []
        with _fork_lock:
            _engines.add(self)
        try:
            self._prepare()
        except BaseException:
            self.writer.close()
            raise
        weakref.finalize(self, _close_all, self.connections)

    # --- connections ---
    def _new_connection(self) -> _Connection:
        connection = _Connection(self._connect, self.options.clock)
        with self.mutex:
            self.connections.add(connection)
        return connection

    def _connect(self) -> sqlite3.Connection:
        self._refuse_closed()
        if self.path is None:
            db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, cached_statements=256)
            db.execute("PRAGMA foreign_keys = ON")
            return db
        uri = _file_uri(self.path, self.options.read_only)
        # timeout=0: waiting for other processes is done by _pause, in steps far shorter than SQLite's 100 ms.
        db = sqlite3.connect(
            uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            if "unix-none" in uri:
                db.execute("PRAGMA locking_mode = EXCLUSIVE")  # no -shm can be made here: keep the index in memory
            for pragma in (
                "foreign_keys = ON",
                f"synchronous = {self.options.synchronous}",
                "fullfsync = ON",  # macOS: an fsync that reaches the disk; elsewhere without effect
                "checkpoint_fullfsync = ON",
                "journal_size_limit = 4194304",  # a restarted WAL shrinks, so that its size tells what is in it
                "cache_size = -16384",
                *(("query_only = ON",) if self.options.read_only else ()),
            ):
                db.execute(f"PRAGMA {pragma}")
        except BaseException:
            db.close()
            raise
        return db

    def _refuse_closed(self) -> None:
        if self.closed:
            raise StoreClosed("the store is closed: open it again")
        if _left_behind and self.path is not None and _file_id(self.path) in _left_behind:
            raise StorageError(
                "this process was forked while a transaction was open on the file, which is the parent's: "
                "fork outside transactions, or start a new process"
            )

    def _pause(self, deadline: float) -> None:
        """Sleep a little while another process holds the file; StoreBusy once that has lasted too long."""
        self._refuse_closed()
        left = deadline - time.monotonic()
        if left <= 0:
            raise StoreBusy(
                f"another process or transaction held the store for more than {self.options.busy_timeout:g} s "
                "(busy_timeout); nothing was written"
            )
        time.sleep(min(left, random.uniform(0.0001, 0.001)))

    def _patiently(self, action: Callable[[], R]) -> R:
        """Run something that finds the file held by another process for a moment, until it does not."""
        deadline = time.monotonic() + self.options.busy_timeout
        while True:
            try:
                return action()
            except StoreBusy:
                self._pause(deadline)

    # --- opening ---
    def _prepare(self) -> None:
        """Create or upgrade the tables, in one transaction, whoever else opens the file at the same time."""
        if self.path is None:
            with self.writer.lock:
                self._build(self.writer.use(), None)
            return
        if not self.options.read_only and not os.path.exists(self.path):
            # Made here, not by SQLite, so that the umask alone decides who may read it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        self._patiently(self._prepare_file)

    def _prepare_file(self) -> None:
        with self.writer.lock:
            tx = self.writer.use()
            if self._version(tx) == _SCHEMA_VERSION and (self.options.read_only or self._in_wal_mode(tx)):
                return
            if self.options.read_only:
                raise SchemaError("the tables are of an older version: open the store once without read_only")
            if not tx.rows("SELECT name FROM sqlite_master LIMIT 1"):
                tx.run("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before the first table
            if not self._in_wal_mode(tx):
                raise StorageError(
                    f"{self.path}: this file system cannot hold a database in WAL mode: choose a local disk"
                )
            tx.run("BEGIN IMMEDIATE")
            try:
                self._build(tx, self._version(tx))
                tx.run("COMMIT")
            finally:
                if tx.db.in_transaction:
                    tx.run("ROLLBACK")

    @staticmethod
    def _in_wal_mode(tx: _Tx) -> bool:
        mode = tx.row("PRAGMA journal_mode")
        if mode != ("wal",):
            mode = tx.row("PRAGMA journal_mode = WAL")
        return mode == ("wal",)

    def _version(self, tx: _Tx) -> int | None:
        """The version of the file's tables, None when there are none; SchemaError for tables that are not ours."""
        tables = self._tables(tx)
        if "flowstore_meta" not in tables:
            if clash := sorted(tables.intersection(_TABLE_NAMES)):
                raise SchemaError(
                    f"{self.target}: the table {clash[0]!r} there is not flowstore's: use another file"
                )
            if self.options.read_only:
                raise StorageError(f"{self.target}: there is no store in it")
            return None
        try:
            row = tx.row("SELECT value FROM flowstore_meta WHERE key = 'schema'")
            version = int(row[0]) if row else 0
        except (StoreBusy, StoreCorrupt):
            raise
        except (StorageError, ValueError) as error:
            raise SchemaError(f"{self.target}: the table 'flowstore_meta' there is not flowstore's") from error
        if version > _SCHEMA_VERSION:
            raise SchemaError(
                f"{self.target}: the tables are of version {version}, this flowstore knows {_SCHEMA_VERSION}: "
                "upgrade flowstore"
            )
        if version < 1 or (version == _SCHEMA_VERSION and not tables.issuperset(_TABLE_NAMES)):
            raise SchemaError(f"{self.target}: some of flowstore's tables are missing: restore it from a backup")
        return version

    def _tables(self, tx: _Tx) -> set[str]:
        return {name for (name,) in tx.rows("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")}

    def _build(self, tx: _Tx, version: int | None) -> None:
        """Make the tables, or upgrade those of an older version."""
        scripts = [_TABLES] if version is None else [_UPGRADES[old] for old in range(version, _SCHEMA_VERSION)]
        for statement in _statements(self.ddl(";".join(scripts))):
            tx.run(statement)
        if version is None:
            tx.run("INSERT INTO flowstore_meta (key, value) VALUES ('schema', ?)", str(_SCHEMA_VERSION))
            _add_tenant(tx, DEFAULT_TENANT)
        tx.run("UPDATE flowstore_meta SET value = ? WHERE key = 'schema'", str(_SCHEMA_VERSION))

    # --- running operations ---
    def run(self, operation: _Operation[Any, Any, Any], facet: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation: in the caller's open transaction, or in one of its own."""
        if _blocks.get() and (block := self.block()) is not None:
            return block.run(operation, facet, args, kwargs)
        if operation.writes and self.options.read_only:
            raise StorageError("the store was opened read-only: nothing can be changed through it")
        if not operation.writes and self.path is not None:
            return self._patiently(lambda: self._run_read(operation, facet, args, kwargs))
        call = _Call(operation, facet, args, kwargs)
        self._with_lead(call, self._lead_group)
        if call.error is not None:
            try:
                raise call.error
            finally:
                del call  # its error's traceback leads back to this frame
        return call.result

    def _run_read(self, operation: _Operation[Any, Any, Any], facet: Any, args: Any, kwargs: Any) -> Any:
        with self.mutex:
            reader = self.readers.pop() if self.readers else None
        if reader is None:
            reader = self._new_connection()
        try:
            with reader.lock:
                tx = reader.use()
                if tx.db.in_transaction:  # of a read that was interrupted before its end
                    tx.run("ROLLBACK")
                if not operation.snapshot:
                    return operation.run(facet, tx, args, kwargs)
                try:
                    tx.run("BEGIN")
                    return operation.run(facet, tx, args, kwargs)
                finally:
                    if tx.db.in_transaction:
                        tx.run("ROLLBACK")
        finally:
            self._give_back(reader)

    def _give_back(self, reader: _Connection) -> None:
        with self.mutex:
            keep = len(self.readers) < _IDLE_READERS and not self.closed
            if keep:
                self.readers.append(reader)
        if not keep:
            with reader.lock:
                reader.close()

    def _with_lead(self, call: _Call, action: Callable[[_Call], None]) -> None:
        """Run `action` once the call leads, unless another leader has done it; safe against two interrupts in a row."""
        call.deadline = time.monotonic() + self.options.busy_timeout
        try:
            with self.mutex:
                if self.lead is None and not self.closed:
                    self.lead = call
            if self.lead is call or self._lead_or_be_served(call):
                action(call)
        except BaseException:
            try:
                self._repair(call)
            except BaseException:
                self._repair(call)
                raise
            raise

    def _lead_or_be_served(self, call: _Call) -> bool:
        """Wait for the writer: True with the lead, False when another leader has done the call."""
        with self.mutex:
            if self.closed:
                self._refuse_closed()
            if self.lead is None or self.lead.abandoned:
                self.lead = call
                return True
            if self.lead.thread == call.thread:
                raise StorageError(
                    "this thread already holds the store (another task's open transaction, or code that runs inside "
                    "an operation) and could only wait for itself"
                )
            call.gate = threading.Lock()
            call.gate.acquire()
            self.queue.append(call)
        while True:
            # A call that was taken is being run: its outcome comes, however late.
            call.gate.acquire(timeout=-1 if call.taken else max(0.0, call.deadline - time.monotonic()))
            with self.mutex:
                if call.done:
                    return False
                if call.taken:
                    continue
                if self.lead is call:
                    self.queue.remove(call)
                    return True
                if self.closed:
                    self.queue.remove(call)
                    self._refuse_closed()
                if self._lead_is_free():
                    self.lead = call
                    self.queue.remove(call)
                    return True
                if time.monotonic() >= call.deadline:
                    if self.lead is not None and self.lead.operation is not None and not self.lead.held_up:
                        call.deadline = time.monotonic() + 0.01  # a commit under way: nobody is holding the store
                        continue
                    self.queue.remove(call)
                    self._pause(call.deadline)  # raises StoreBusy

    def _lead_is_free(self) -> bool:
        return self.lead is None or self.lead.abandoned

    def _begin(self, call: _Call) -> bool:
        """BEGIN IMMEDIATE on the writer, whose lock the caller holds; False when another process has the file."""
        try:
            db = (self.writer.tx or self.writer.use()).db
            if db.in_transaction:  # of a block whose end was never run
                db.execute("ROLLBACK")
            db.execute("BEGIN IMMEDIATE")
        except (StoreBusy, sqlite3.Error) as error:
            if isinstance(error, sqlite3.Error) and not isinstance(failure := _failure(error), StoreBusy):
                raise failure from error
            call.held_up = True
            return False
        call.running, call.held_up = True, False
        self.outcome.clear()
        return True

    def _lead_group(self, leader: _Call) -> None:
        """Begin, take what has queued, run it all, commit, wake the callers, and hand on the lead."""
        while not self._try_group(leader):
            self._pause(leader.deadline)
        with self.mutex:
            if not self.queue:
                self.lead = None
                return
        if time.monotonic() > self.breath:
            # Threads that hand on the lead without a break would starve other processes, who can only try now and then.
            time.sleep(0.0005)
            self.breath = time.monotonic() + 0.025
        self._pass_on(leader)

    def _try_group(self, leader: _Call) -> bool:
        operation = leader.operation
        with self.writer.lock:
            if operation is None or not self._begin(leader) or (tx := self.writer.tx) is None:
                return False
            self.group = [leader]
            try:
                if self.queue:  # only now: until here each of them could time out on its own clock
                    self._take()
                try:
                    if len(self.group) == 1:
                        leader.result = operation.run(leader.facet, tx, leader.args, leader.kwargs)
                    else:
                        tx.run("SAVEPOINT flowstore_group")  # to begin again without giving the file to others
                        if not self._run_group(tx, savepoints=False):
                            tx.run("ROLLBACK TO flowstore_group")
                            self._run_group(tx, savepoints=True)
                    self._commit(tx, leader.deadline)
                except StorageError as error:  # the transaction of all of them
                    for call in self.group:
                        call.result, call.error = None, _copy(error)
                except Exception as error:  # of the only one: nothing is committed
                    leader.error = error
                for call in self.group:
                    call.done = True
            finally:
                if tx.db.in_transaction:
                    tx.run("ROLLBACK")
            if len(self.group) > 1:
                for call in self.group:
                    call.wake()
            wrote = any(call.operation is not None and call.operation.writes for call in self.group)
            self.group = []
            if wrote:  # in memory reads come this way too: they are no news
                self._committed(tx)
        return True

    def _take(self) -> None:
        with self.mutex:
            while self.queue and self.queue[0].operation is not None and len(self.group) < _GROUP_MOST:
                self.queue[0].taken = True  # in this order: struck between two steps, none of them is nowhere
                self.group.append(self.queue[0])
                self.queue.popleft()

    def _run_group(self, tx: _Tx, savepoints: bool) -> bool:
        """Run the operations of the group; False when one failed after it had written, without savepoints.

        A failure of the database itself is everybody's: after a full disk or an I/O error SQLite may have rolled back
        all of it already, and a savepoint outside a transaction would open one that its release commits."""
        db = tx.db
        for call in self.group:
            changes = db.total_changes
            if savepoints:
                tx.run("SAVEPOINT flowstore_call")
            try:
                call.result = call.operation.run(call.facet, tx, call.args, call.kwargs)  # type: ignore[union-attr]
                call.error = None
            except StorageError:
                raise
            except Exception as error:
                if not db.in_transaction:
                    raise StorageError("the database ended the transaction") from error
                call.result, call.error = None, error
                if savepoints:
                    tx.run("ROLLBACK TO flowstore_call")
                elif db.total_changes != changes:
                    return False
            if savepoints:
                tx.run("RELEASE flowstore_call")
        return True

    def _commit(self, tx: _Tx, deadline: float) -> None:
        while tx.db.in_transaction:
            try:
                # One step for an interrupt: either COMMIT has succeeded and `outcome` says so, or neither.
                self.outcome.extend(map(type, map(tx.db.execute, ("COMMIT",))))
            except sqlite3.Error as error:
                failure = _failure(error)
                if not isinstance(failure, StoreBusy):
                    raise failure from error
                self._pause(deadline)  # never in WAL mode; a file that someone took out of it may have readers

    def _committed(self, tx: _Tx) -> None:
        """After a commit: tell those who wait for something to happen, and mind the WAL."""
        self.commits += 1
        if self.watching:
            self._wake_watchers()
        if self.path is None:
            return
        try:
            if (writer := self.writer).wal < 0:  # kept open: a seek to its end costs a tenth of a stat
                writer.wal = os.open(f"{self.path}-wal", os.O_RDONLY | getattr(os, "O_BINARY", 0))
            size = os.lseek(writer.wal, 0, os.SEEK_END)
        except OSError:
            return
        if size >= _WAL_BOUND:
            self._bound_wal(tx, size)
        else:
            self.checkpoint_at = _WAL_BOUND

    def _wake_watchers(self) -> None:
        for gate in list(self.watching):
            with contextlib.suppress(RuntimeError):  # it has been opened already
                gate.release()

    def wait(self, seen: int, seconds: float) -> Any:
        """Wait for a commit after the first `seen` ones, or for the time to look what other processes did."""
        self._refuse_closed()
        (gate := threading.Lock()).acquire()
        try:
            self.watching.add(gate)
            if self.commits == seen:
                gate.acquire(timeout=max(0.0, min(seconds, self.tick)))
        finally:
            self.watching.discard(gate)

    def _pass_on(self, call: _Call) -> None:
        """Hand the lead to the first in the queue; safe to repeat."""
        with self.mutex:
            if self.lead is call or self._lead_is_free():
                self.lead = self.queue[0] if self.queue else None
            following = self.lead
        if following is not None:
            following.wake()

    def _repair(self, call: _Call) -> None:
        """After an exception, Ctrl-C included, at any point of a call: leave the engine as if it had not been there.

        Not committed: roll back and queue the others of the group again. Committed: all of them are done. It may
        itself be interrupted and begin again, as every step can be repeated."""
        if self.lead is call:
            self._repair_lead(call)
        with self.mutex:
            call.abandoned = self.lead is not call  # in another's group it is, perhaps, but nobody waits for it
            if call in self.queue:
                self.queue.remove(call)
        self._pass_on(call)

    def _repair_lead(self, call: _Call) -> None:
        with self.writer.lock:
            if call.running and self.writer.in_transaction:
                self.writer.use().run("ROLLBACK")
            with self.mutex:
                others = [other for other in self.group if other is not call]
                for other in reversed(others):
                    if self.outcome:
                        other.done = True
                    if not other.done and not other.abandoned and other not in self.queue:
                        self.queue.appendleft(other)
                    other.taken = other.done
                self.group = []
        for other in others:
            other.wake()

    # --- the WAL's bound ---
    def _bound_wal(self, tx: _Tx, size: int) -> None:
        """Keep the WAL near 16 MB: readers that overlap for ever would let it grow for ever.

        The one that commits past the bound waits, for a second at most, until the readers there are have ended; new
        ones read past the WAL meanwhile. Where a foreign reader holds it longer, the next try comes 16 MB later."""
        if size < self.checkpoint_at:
            return
        try:
            tx.run("PRAGMA busy_timeout = 1000")
            held = tx.row("PRAGMA wal_checkpoint(RESTART)")
            # Restarted, the file shrinks at the next commit; until then its size says nothing.
            self.checkpoint_at = size + 1 if held is not None and not held[0] else size + _WAL_BOUND
        except StorageError:
            self.checkpoint_at = size + _WAL_BOUND  # what was committed is committed: the next one tries again
        finally:
            tx.run("PRAGMA busy_timeout = 0")

    # --- having the writer for oneself ---
    def acquire(self, call: _Call) -> None:
        """Wait for the lead, alone, and begin a transaction."""
        self._with_lead(call, self._begin_alone)

    def _begin_alone(self, call: _Call) -> None:
        while True:
            with self.writer.lock:
                if self._begin(call):
                    return
            self._pause(call.deadline)

    def commit(self) -> None:
        """Commit the transaction of `acquire`; `_repair` then hands on the lead."""
        with self.writer.lock:
            tx = self.writer.use()
            self._commit(tx, time.monotonic() + self.options.busy_timeout)
            self._committed(tx)

    def alone(self, action: Callable[[_Tx], R]) -> R:
        """Run `action` on the writer outside any transaction, while nobody else writes."""
        results: list[R] = []

        def lead(call: _Call) -> None:
            with self.writer.lock:
                results.append(action(self.writer.use()))
            self._pass_on(call)

        self._with_lead(_Call(None, None, None, None), lead)
        return results[0]

    def aside(self, action: Callable[[_Tx], R]) -> R:
        """Run `action` on a connection of its own (in memory: on the one there is)."""
        if self.path is None:
            return self.alone(action)

        def run() -> R:
            connection = self._new_connection()
            with connection.lock:
                try:
                    return action(connection.use())
                finally:
                    connection.close()

        return self._patiently(run)

    def now(self) -> datetime:
        """The store's time, in UTC."""
        clock = self.options.clock
        return datetime.now(UTC) if clock is None else _datetime(_time(clock(), "clock()"))

    def sizes(self, tx: _Tx) -> dict[str, int]:
        """Bytes of the database, and of the write-ahead log beside it."""
        pages, size = tx.rows("PRAGMA page_count")[0][0], tx.rows("PRAGMA page_size")[0][0]
        wal = f"{self.path}-wal"
        wal_bytes = os.path.getsize(wal) if self.path is not None and os.path.exists(wal) else 0
        return {"file_bytes": pages * size, "wal_bytes": wal_bytes}

    def backup(self, path: str) -> None:
        """Copy one state of the database to `path`; the copy gets its name when it is complete and on disk."""
        folder = os.path.dirname(path)
        if os.path.lexists(path):
            raise StorageError(f"{path}: there is something already: choose a path that is free")
        if not os.path.isdir(folder):
            raise StorageError(f"{path}: the folder does not exist: make it first")
        partial = f"{path}.{new_id()}.partial"
        try:
            self.aside(lambda tx: self._copy_to(tx, partial))
            _sync(partial, os.O_RDWR)
            try:
                os.link(partial, path)  # unlike a rename, never over a file that came meanwhile
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                os.rename(partial, path)
            with contextlib.suppress(OSError):  # the new name: not every system can sync a folder
                _sync(folder, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{path}: the backup could not be written: {error}") from error
        finally:
            for left in (partial, partial + "-journal"):
                with contextlib.suppress(OSError):
                    os.remove(left)

    def _copy_to(self, tx: _Tx, path: str) -> None:
        _copy_database(tx, path)

    def compact(self) -> None:
        """Return free pages in small steps, then empty the WAL."""
        if self.options.read_only:
            raise StorageError("the store was opened read-only: nothing can be changed through it")
        while self._patiently(lambda: self.alone(_vacuum_step)):
            pass
        if self.path is not None:
            self._patiently(lambda: self.alone(_truncate_wal))

    def transaction(self) -> _Block:
        """A new transaction block, not begun."""
        return _Block(self)

    def block(self) -> _Block | None:
        """The innermost transaction block that this thread or task has open, if any."""
        for held in _blocks.get():
            block = held()
            if block is not None and block.engine is self and block.is_open and block.thread == threading.get_ident():
                return block
        return None

    def forbid_inside(self, what: str) -> None:
        """StorageError inside one's own transaction."""
        if self.block() is not None:
            raise StorageError(f"{what} cannot be done inside a transaction: leave the block first")

    # --- closing ---
    def close(self) -> None:
        """Close every connection; who waits is woken with StoreClosed, an open transaction is rolled back."""
        with self.mutex:
            self.closed = True
            waiting = list(self.queue)
        for call in waiting:
            call.wake()
        self._wake_watchers()
        with self.mutex:
            connections = [one for one in self.connections if one is not self.writer]
        for connection in (*connections, self.writer):  # the writer last: it leaves no WAL behind
            with connection.lock, contextlib.suppress(sqlite3.Error):
                connection.close()

    # --- fork ---
    def before_fork(self) -> None:
        """Wait for the statements being executed, then close every connection.

        SQLite keeps its file locks in a table per process. `fork` copies the table but not the locks, so a child
        that held on to a connection would take the file for locked when it is not, and lose what is written."""
        while True:
            with self.mutex:
                known = set(self.connections)
            for connection in known:
                connection.lock.acquire()
            self.mutex.acquire()
            if known.issuperset(self.connections):
                break
            self.mutex.release()
        self._held = list(known)
        for connection in known:
            if self.path is not None and not connection.in_transaction:
                connection.close()

    def after_fork_in_parent(self) -> None:
        """Go on: each connection is opened again at its next use."""
        for lock in (self.mutex, *(connection.lock for connection in self._held)):
            # However often it was taken: an interrupt may have made the step before begin again.
            if lock._is_owned():  # type: ignore[attr-defined]
                lock._release_save()  # type: ignore[attr-defined]

    def after_fork_in_child(self) -> None:
        """Begin anew: the other threads, and what they held or waited for, exist in the parent alone."""
        for connection in self._held:
            connection.lock = threading.RLock()
            if connection.in_transaction and connection.tx is not None:
                if self.path is None:
                    connection.tx.run("ROLLBACK")
                else:
                    # Closing it would write to the parent's file: it is kept for ever, and the file refused here.
                    _keep_for_ever(connection.tx.db)
                    connection.tx = None
                    _left_behind.add(_file_id(self.path))
        self.mutex = threading.RLock()
        self.watching = set()
        self.lead = None
        self.queue.clear()
        self.group = []

_engines: weakref.WeakSet[_Engine] = weakref.WeakSet()
_forking: list[_Engine] = []
_fork_lock = threading.RLock()
_left_behind: set[tuple[int, ...]] = set()
_kept: list[object] = []

def _keep_for_ever(db: sqlite3.Connection) -> None:
    """A reference that outlives the interpreter's own cleaning up."""
    _kept.append(db)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))

def _copy_database(tx: _Tx, path: str) -> None:
    """Copy what one snapshot sees, in steps (each can be interrupted), so that no write makes it begin anew."""
    try:
        copy = sqlite3.connect(path, isolation_level=None)
        try:
            tx.run("BEGIN")
            tx.rows("SELECT value FROM flowstore_meta LIMIT 1")
            tx.db.backup(copy, pages=4096)
        finally:
            copy.close()
            if tx.db.in_transaction:
                tx.run("ROLLBACK")
    except sqlite3.Error as error:
        raise _failure(error) from error

def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

def _vacuum_step(tx: _Tx) -> bool:
    """Return some free pages to the file system; True while there are more."""
    if tx.row("PRAGMA auto_vacuum") == (0,):  # the file was not made by us
        tx.run("VACUUM")
        return False
    before = tx.rows("PRAGMA freelist_count")[0][0]
    tx.rows("PRAGMA incremental_vacuum(1000)")
    return bool(0 < tx.rows("PRAGMA freelist_count")[0][0] < before)

def _truncate_wal(tx: _Tx) -> None:
    tx.run("PRAGMA busy_timeout = 1000")
    try:
        held = tx.row("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        tx.run("PRAGMA busy_timeout = 0")
    if held is not None and held[0]:
        raise StoreBusy("a reader holds the write-ahead log: it could not be emptied")

def _close_all(connections: Iterable[_Connection]) -> None:
    for connection in list(connections):
        if connection.lock.acquire(timeout=1):
            with contextlib.suppress(sqlite3.Error):
                connection.close()
            connection.lock.release()

def _copy(error: StorageError) -> StorageError:
    """The same error for another thread: a traceback belongs to one."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy

def _file_id(path: str) -> tuple[int, ...]:
    """Inode and device."""
    with contextlib.suppress(OSError):
        return os.stat(path)[1:3]
    return (0, 0)

def _file_uri(path: str, read_only: bool) -> str:
    """How to open the file: never creating it by the way, and read-only in the way its folder allows."""
    import pathlib

    uri = pathlib.Path(path).as_uri()
    if not read_only:
        return uri + "?mode=rw"
    wal, shm = path + "-wal", path + "-shm"
    if os.access(os.path.dirname(path), os.W_OK) or (os.path.exists(wal) and os.path.exists(shm)):
        return uri + "?mode=ro"
    if not os.path.exists(wal) or not os.path.getsize(wal):
        return uri + "?mode=ro&immutable=1"  # at rest, and nobody here could write it
    return uri + "?mode=ro&vfs=unix-none"

if hasattr(os, "register_at_fork"):
    def _at_fork(step: str) -> None:
        """Do a step for every engine, whatever interrupts it: nothing that is left out could be made good."""
        global _fork_lock  # noqa: PLW0603 (a lock that another thread held is of no use in the child)
        while True:
            try:
                if step == "before_fork":
                    _fork_lock.acquire()
                    _forking[:] = _engines
                for engine in _forking:
                    getattr(engine, step)()
                if step == "after_fork_in_parent" and _fork_lock._is_owned():  # type: ignore[attr-defined]
                    _fork_lock._release_save()  # type: ignore[attr-defined]
                elif step == "after_fork_in_child":
                    _fork_lock = threading.RLock()
                if step != "before_fork":
                    _forking.clear()
                return
            except KeyboardInterrupt:
                continue

    os.register_at_fork(
        before=functools.partial(_at_fork, "before_fork"),
        after_in_parent=functools.partial(_at_fork, "after_fork_in_parent"),
        after_in_child=functools.partial(_at_fork, "after_fork_in_child"),
    )

_REFUSED_SQL = re.compile(
    r"(?:[\s;\ufeff]|--[^\n]*(?:\n|$)|/\*.*?(?:\*/|$))*"
    r"(BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE|ATTACH|DETACH|VACUUM|PRAGMA)\b",
    re.IGNORECASE | re.DOTALL,
)

class Transaction:
    """An open transaction, for the user's own SQL in the same database. Source: SqliteBackend::pool."""

    def __init__(self, block: _Block) -> None:
        # Weakly: a block whose end was lost must not be kept open by the variable it was given to.
        self._block = weakref.ref(block)

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement of the user's own and return its rows.

        Raises StorageError for the driver's error, for statements that would end the transaction or reach outside
        it (BEGIN, COMMIT, ROLLBACK, SAVEPOINT, RELEASE, ATTACH, VACUUM, PRAGMA), and after the block."""
        return self._open().execute(sql, lambda tx: tx.db.execute(sql, parameters).fetchall())

    def executemany(self, sql: str, rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> None:
        """Run one statement for each of the rows; errors as with `execute`."""
        block, parameters = self._open(), list(rows)
        block.execute(sql, lambda tx: tx.db.executemany(sql, parameters).fetchall())

    def _open(self) -> _Block:
        """The innermost block here: SQL given to an outer `tx` belongs to the block nested in it."""
        block = self._block()
        if block is None or not block.is_open:
            raise StorageError("the transaction has ended: use tx inside its with block only")
        innermost = block.engine.block()
        if innermost is None or innermost.root is not block.root:
            raise StorageError("the transaction belongs to the thread or task that opened it")
        return innermost

class _Block:
    """`with store.transaction()`: everything that the thread or task does in it, or nothing.

    The `with` statement alone holds it. If an interrupt strikes so that its end is never run, it is collected, and
    its finalizer leaves word that the next caller may roll back and have the writer."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.thread = 0
        self.is_open = False
        self.parent: _Block | None = None
        self.nested: list[tuple[weakref.ref[_Block], str]] = []  # of the outermost block: those open in it
        self.savepoint = ""
        self._call: _Call | None = None
        self._connection = engine.writer
        self._ref = weakref.ref(self)

    def __enter__(self) -> Transaction:
        if self.thread:
            raise StorageError("a transaction object opens one block: call store.transaction() again")
        self.thread = threading.get_ident()
        engine = self.engine
        self.parent = engine.block()
        if self.parent is not None:
            self._connection = self.parent._connection
            with self._connection.lock:
                self.savepoint = f"flowstore_{new_id()[24:]}"  # a name once used may still stand below
                self.parent.tx().run(f"SAVEPOINT {self.savepoint}")
                self.root.nested.append((self._ref, self.savepoint))
        else:
            self._acquire()
        self.is_open = True
        _blocks.set((self._ref, *(ref for ref in _blocks.get() if ref() is not None)))
        return Transaction(self)

    def _acquire(self) -> None:
        """Begin the transaction of an outermost block."""
        engine = self.engine
        if engine.options.read_only and engine.path is not None:
            self._connection = engine._new_connection()
            with self._connection.lock:
                engine._patiently(self._begin_snapshot)
        else:
            self._call = _Call(None, None, None, None)
            engine.acquire(self._call)

    def _begin_snapshot(self) -> None:
        tx = self._connection.use()
        if not tx.db.in_transaction:
            tx.run("BEGIN")
        tx.rows("SELECT value FROM flowstore_meta LIMIT 1")  # the snapshot begins with the first read

    @property
    def root(self) -> _Block:
        """The outermost block."""
        return self if self.parent is None else self.parent.root

    def tx(self) -> _Tx:
        """The open transaction, under the connection's lock; StorageError when the block can no longer be used."""
        self.engine._refuse_closed()
        if not self.is_open:
            raise StorageError("the transaction has ended: use tx inside its with block only")
        tx = self._connection.use()
        if not tx.db.in_transaction:
            raise StorageError("the database ended this transaction, nothing of it was stored: run the block again")
        nested = self.root.nested
        while nested and nested[-1][0]() is None:  # its end was never run
            with contextlib.suppress(StorageError):  # or almost: then its savepoint is gone already
                tx.run(f"ROLLBACK TO {nested[-1][1]}")
            nested.pop()
        if (nested[-1][0]() if nested else self.root) is not self:
            raise StorageError("another task has a transaction nested in this one: let it end first")
        return tx

    def run(self, operation: _Operation[Any, Any, Any], facet: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation as a savepoint of its own."""
        with self._connection.lock:
            tx = self.tx()
            if not operation.writes:
                return operation.run(facet, tx, args, kwargs)
            if self.engine.options.read_only:
                raise StorageError("the store was opened read-only: nothing can be changed through it")
            return self._in_savepoint(tx, lambda: operation.run(facet, tx, args, kwargs))

    def execute(self, sql: object, action: Callable[[_Tx], R]) -> R:
        """Run a statement of the user's own."""
        if not isinstance(sql, str):
            raise InvalidData(f"sql: text is needed, not {type(sql).__name__}")
        if refused := _REFUSED_SQL.match(sql):
            raise StorageError(f"{refused[1].upper()} is not for a statement inside transaction(): the block does that")
        with self._connection.lock:
            tx = self.tx()
            try:
                return self._in_savepoint(tx, lambda: action(tx))
            except (*_DRIVER_ERRORS, ValueError) as error:
                raise StorageError(f"the statement failed: {error}") from error

    @staticmethod
    def _in_savepoint(tx: _Tx, action: Callable[[], R]) -> R:
        tx.run("SAVEPOINT flowstore_call")
        try:
            result = action()
        except BaseException:
            if tx.db.in_transaction:  # not after an error with which SQLite has rolled back everything
                tx.run("ROLLBACK TO flowstore_call")
                tx.run("RELEASE flowstore_call")
            raise
        tx.run("RELEASE flowstore_call")
        return result

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            self._end(commit=kind is None)
        except StorageError:
            if kind is None:
                raise  # else what the block raised says more

    def _end(self, commit: bool) -> None:
        try:
            with self._connection.lock:
                tx = self.tx()
                if self.parent is not None:
                    if not commit:
                        tx.run(f"ROLLBACK TO {self.savepoint}")
                    tx.run(f"RELEASE {self.savepoint}")
                else:
                    self._finish(tx, commit)
        finally:
            self._leave()

    def _finish(self, tx: _Tx, commit: bool) -> None:
        """Commit, or leave it to `_release` to roll back."""
        if self._call is None:
            tx.run("ROLLBACK")
        elif commit:
            self.engine.commit()

    def _release(self) -> None:
        """After an outermost block: give back what it held."""
        if self._call is not None:
            self.engine._repair(self._call)
        else:
            with self._connection.lock:
                self._connection.close()

    def _leave(self) -> None:
        self.is_open = False
        if self.parent is not None and (self._ref, self.savepoint) in self.root.nested:
            self.root.nested.remove((self._ref, self.savepoint))
        if self.parent is None:
            self._release()
        _blocks.set(tuple(ref for ref in _blocks.get() if ref is not self._ref))

    def __del__(self) -> None:
        # Runs at any point of any thread, so it takes no lock: who waits looks for itself.
        if self._call is not None:
            self._call.abandoned = self.engine.lead is self._call
            for waiting in [self.engine.lead, *list(self.engine.queue)[:1]]:
                if waiting is not None:
                    waiting.wake()


# ============================================================================================================
# Facets: the operations, grouped as the seeds group them
# ============================================================================================================

_TENANT_TABLES = re.compile("flowstore_(executions|log|runs|snapshots|work_items|definitions|effects|artifacts|tokens)")

class _Sql:
    """A statement on a table that has tenants, in two texts: for all of them, and for one.

    `{tenant}` marks where the condition goes. A statement without the mark is refused when the module is imported,
    unless it inserts, so no statement can forget the tenant. (Not `? IS NULL OR tenant_id = ?`: no index serves it.)"""
    __slots__ = ("all", "one", "places")

    def __init__(self, text: str, **words: str) -> None:
        text = " ".join(text.split())
        for word, meaning in words.items():
            text = text.replace(f"{{{word}}}", meaning)
        inserts = text.startswith("INSERT") and "tenant_id" in text
        if "{tenant}" not in text and not inserts and _TENANT_TABLES.search(text):
            raise AssertionError(f"a statement on a tenant's table without {{tenant}}: {text}")
        self.all = text.replace("{tenant}", "")
        self.one = text.replace("{tenant}", "AND tenant_id = ?")
        parts = text.split("{tenant}")
        # Where the tenant goes among the parameters: behind those of the text before each mark.
        counts = [part.count("?") for part in parts[:-1]]
        self.places = tuple(sum(counts[: index + 1]) + index for index in range(len(counts)))

class _Facet:
    """What every facet has: the engine that runs its operations and, for a tenant's view, the tenant."""

    def __init__(self, engine: _Engine, tenant: str | None = None) -> None:
        self._engine = engine
        self._run = engine.run
        self._tenant = tenant

    def _rows(self, tx: _Tx, sql: _Sql, *params: Any) -> list[tuple[Any, ...]]:
        """The rows of a statement, of this view's tenant alone."""
        if self._tenant is None:
            return tx.rows(sql.all, *params)
        scoped = list(params)
        for place in sql.places:
            scoped.insert(place, self._tenant)
        return tx.rows(sql.one, *scoped)

    def _row(self, tx: _Tx, sql: _Sql, *params: Any) -> tuple[Any, ...] | None:
        rows = self._rows(tx, sql, *params)
        return rows[0] if rows else None

    def _lease(self, lease_seconds: float | None) -> float:
        if lease_seconds is None:
            return self._engine.options.lease_seconds
        if isinstance(lease_seconds, (int, float)) and lease_seconds < 0:
            raise InvalidData("lease_seconds: a lease lasts 0 seconds or more")
        return _seconds(lease_seconds, "lease_seconds")

def _steps(function: Callable[Concatenate[F, P], Generator[Any, Any, R]]) -> Callable[Concatenate[F, P], R]:
    """A method made of several transactions, or of user code between them, written as a generator of its steps.

    Each `yield` hands a step's outcome to the driver and takes it back."""

    @functools.wraps(function)
    def method(facet: F, /, *args: P.args, **kwargs: P.kwargs) -> R:
        steps, outcome = function(facet, *args, **kwargs), None
        while True:
            try:
                outcome = steps.send(outcome)
            except StopIteration as end:
                result: R = end.value
                return result

    return method

def _stamped(values: dict[str, Any], now: int, *names: str) -> dict[str, Any]:
    """The column values, those times filled that the record leaves to the store's clock."""
    return values | {name: now for name in names if values[name] is None}

def _insert(tx: _Tx, mapper: _Mapper[T], table: str, kind: str, record: T) -> T:
    """Store a new record and return it as stored; AlreadyExists for a taken id."""
    values = _stamped(mapper.encode(record, argument=kind), tx.now(), "created_at", "updated_at")
    if not tx.run(mapper.insert(table), *values.values()):
        raise AlreadyExists(kind, values["id"])
    return mapper.decode(values.values())

def _found(thing: T | None, kind: str, id: str) -> T:
    """What was looked for; NotFound when it is not there."""
    if thing is None:
        raise NotFound(kind, id)
    return thing

# --- flows ---
_FLOW_BY_ID = _FLOW.select("flows WHERE id = ?")
_FLOWS_BY_OWNER = _FLOW.select("flows WHERE owner_session_key = ? ORDER BY created_at DESC, id DESC LIMIT ? OFFSET ?")
_FLOWS_BY_STATUS = _FLOW.select("flows WHERE status = ? ORDER BY updated_at, id LIMIT ? OFFSET ?")
_FLOW_UPDATE = f"{_FLOW.update('flows', 'created_at')} AND revision = ? RETURNING {_FLOW.columns}"
_FLOW_REVISION = "SELECT revision FROM flows WHERE id = ?"
_FLOW_EVENT_INSERT = (
    "INSERT INTO flow_events (flow_id, kind, payload, at) SELECT id, ?, ?, ? FROM flows WHERE id = ? "
    f"RETURNING {_FLOW_EVENT.columns}"
)
_FLOW_EVENTS = _FLOW_EVENT.select("flow_events WHERE flow_id = ? ORDER BY id DESC LIMIT ?")
_STEP_BY_ID = _STEP.select("flow_steps WHERE id = ?")
_STEP_BY_RUN_ID = _STEP.select("flow_steps WHERE flow_id = ? AND run_id = ?")
_STEPS = _STEP.select("flow_steps WHERE flow_id = ? ORDER BY created_at, id")
_STEP_UPDATE = (
    f"{_STEP.update('flow_steps', 'flow_id', 'created_at')} AND NOT EXISTS (SELECT 1 FROM flow_steps other WHERE "
    f"other.flow_id = flow_steps.flow_id AND other.run_id = ? AND other.id <> flow_steps.id) RETURNING {_STEP.columns}"
)
_FLOWS_ENDED = """SELECT id,
    (SELECT COUNT(*) FROM (SELECT 1 FROM flow_events WHERE flow_id = flows.id LIMIT 250) counted) +
    (SELECT COUNT(*) FROM (SELECT 1 FROM flow_steps WHERE flow_id = flows.id LIMIT 250) counted)
    FROM flows WHERE status = ? AND updated_at < ? ORDER BY updated_at, id LIMIT 50"""
_PRUNED_AT_ONCE = 250  # rows in one transaction: a few milliseconds

class FlowStore(_Facet):
    """Revision-checked flows with their steps and their audit trail. Source: FlowStore."""

    @_write
    def insert(self, tx: _Tx, flow: Flow) -> Flow:
        """Store a new flow and return it as stored. Raises AlreadyExists. Source: FlowStore.insert."""
        return _insert(tx, _FLOW, "flows", "flow", flow)

    @_read
    def get(self, tx: _Tx, id: AnyId) -> Flow | None:
        """The flow as it is now, or None. Source: FlowStore.get."""
        return _FLOW.maybe(tx.row(_FLOW_BY_ID, _id(id, "id")))

    @_read
    def list_by_owner(
        self, tx: _Tx, owner_session_key: str, *, limit: int | None = None, offset: int = 0
    ) -> list[Flow]:
        """The owner's flows, newest `created_at` first. Source: FlowStore.list_by_owner."""
        owner = _key(owner_session_key, "owner_session_key")
        return _FLOW.decode_all(tx.rows(_FLOWS_BY_OWNER, owner, _limit(limit), _count(offset, "offset")))

    @_read
    def list_by_status(
        self, tx: _Tx, status: FlowStatus | str, *, limit: int | None = None, offset: int = 0
    ) -> list[Flow]:
        """The flows in a status, oldest `updated_at` first. Source: FlowStore.list_by_status."""
        word = _enum(FlowStatus, status, "status").value
        return _FLOW.decode_all(tx.rows(_FLOWS_BY_STATUS, word, _limit(limit), _count(offset, "offset")))

    @_write
    def update_with_revision(self, tx: _Tx, flow: Flow) -> Flow:
        """Write the flow, if its revision is current. Raises RevisionMismatch, NotFound. Source: FlowStore."""
        return self._update(tx, flow)

    def _update(self, tx: _Tx, flow: Flow) -> Flow:
        values = _FLOW.encode(flow, argument="flow")
        flow_id, revision, _ = values.pop("id"), values["revision"], values.pop("created_at")
        values |= {"revision": _int(revision + 1, "revision"), "updated_at": tx.now()}
        row = tx.row(_FLOW_UPDATE, *values.values(), flow_id, revision)
        if row is None:
            raise RevisionMismatch(revision, _found(tx.row(_FLOW_REVISION, flow_id), "flow", flow_id)[0])
        return _FLOW.decode(row)

    @_write
    def append_event(self, tx: _Tx, flow_id: AnyId, kind: str, payload: Json) -> FlowEvent:
        """Add a line to the flow's audit trail. Raises NotFound. Source: FlowStore.append_event."""
        return self._append(tx, _id(flow_id, "flow_id"), _text(kind, "kind"), _json(payload, "payload"))

    def _append(self, tx: _Tx, flow_id: str, kind: str, payload: str) -> FlowEvent:
        row = tx.row(_FLOW_EVENT_INSERT, kind, payload, tx.now(), flow_id)
        return _FLOW_EVENT.decode(_found(row, "flow", flow_id))

    @_read
    def list_events(self, tx: _Tx, flow_id: AnyId, limit: int = 100) -> list[FlowEvent]:
        """The flow's audit trail, newest first. Source: FlowStore.list_events."""
        return _FLOW_EVENT.decode_all(tx.rows(_FLOW_EVENTS, _id(flow_id, "flow_id"), _limit(limit)))

    @_write
    def update_and_append(self, tx: _Tx, flow: Flow, event_kind: str, event_payload: Json) -> tuple[Flow, FlowEvent]:
        """`update_with_revision` and `append_event`, both or neither. Source: FlowStore.update_and_append."""
        kind, payload = _text(event_kind, "event_kind"), _json(event_payload, "event_payload")
        stored = self._update(tx, flow)
        return stored, self._append(tx, stored.id, kind, payload)

    @_write
    def insert_step(self, tx: _Tx, step: FlowStep) -> FlowStep:
        """Store a new step. Raises NotFound (flow), AlreadyExists (id, or run id in the flow). Source: insert_step."""
        flow_id, run_id = _id(_is(FlowStep, step, "step").flow_id, "flow_id"), _id(step.run_id, "run_id")
        _found(tx.row(_FLOW_REVISION, flow_id), "flow", flow_id)
        if tx.row(_STEP_BY_RUN_ID, flow_id, run_id):
            raise AlreadyExists("flow step", run_id)
        return _insert(tx, _STEP, "flow_steps", "flow step", step)

    @_write
    def update_step(self, tx: _Tx, step: FlowStep) -> FlowStep:
        """Write the step; the last writer wins. Raises NotFound, AlreadyExists (run id). Source: update_step."""
        values = _STEP.encode(step, argument="step") | {"updated_at": tx.now()}
        step_id, run_id = values.pop("id"), values["run_id"]
        del values["flow_id"], values["created_at"]
        row = tx.row(_STEP_UPDATE, *values.values(), step_id, run_id)
        if row is None:
            _found(tx.row(_STEP_BY_ID, step_id), "flow step", step_id)
            raise AlreadyExists("flow step", run_id)
        return _STEP.decode(row)

    @_read
    def get_step(self, tx: _Tx, id: AnyId) -> FlowStep | None:
        """The step as it is now, or None. Source: FlowStore.get_step."""
        return _STEP.maybe(tx.row(_STEP_BY_ID, _id(id, "id")))

    @_read
    def list_steps(self, tx: _Tx, flow_id: AnyId) -> list[FlowStep]:
        """The flow's steps, oldest `created_at` first. Source: FlowStore.list_steps."""
        return _STEP.decode_all(tx.rows(_STEPS, _id(flow_id, "flow_id")))

    @_read
    def find_step_by_run_id(self, tx: _Tx, flow_id: AnyId, run_id: AnyId) -> FlowStep | None:
        """The flow's step with this run id, or None. Source: FlowStore.find_step_by_run_id."""
        return _STEP.maybe(tx.row(_STEP_BY_RUN_ID, _id(flow_id, "flow_id"), _id(run_id, "run_id")))

    @_steps
    def prune_terminal_flows(self, retain_days: int) -> Generator[Any, Any, int]:
        """Drop ended flows not updated for `retain_days` days, in small transactions; how many. Source: FlowStore."""
        age, gone = _count(retain_days, "retain_days") * 86_400_000_000, 0
        before = max(_FIRST_TIME, _time(self._engine.now(), "clock()") - age)
        for status in FlowStatus:
            while status.is_terminal and (chunk := (yield self._prune_chunk(status, before))):
                gone += chunk
        return gone

    @_write
    def _prune_chunk(self, tx: _Tx, status: str, before: int) -> int:
        """Drop as many flows as a short transaction can with all that is theirs, at least one; how many went."""
        chosen: list[tuple[str]] = []
        rows = 0
        for flow_id, children in tx.rows(_FLOWS_ENDED, status, before):
            rows += 1 + children
            if rows <= _PRUNED_AT_ONCE or not chosen:
                chosen.append((flow_id,))
        tx.run_many("DELETE FROM flows WHERE id = ?", chosen)
        return len(chosen)

# --- the execution log ---
_LOG_HEAD = _Sql(
    """SELECT tenant_id, (SELECT t.status FROM flowstore_tenants t WHERE t.id = tenant_id),
        (SELECT l.sequence FROM flowstore_log l WHERE l.execution_id = e.execution_id ORDER BY l.sequence DESC LIMIT 1)
    FROM flowstore_executions e WHERE execution_id = ? {tenant}"""
)
_LOG_INSERT = (
    "INSERT INTO flowstore_log (execution_id, sequence, tenant_id, event, timestamp, event_id) "
    "VALUES (?, ?, ?, ?, ?, ?)"
)
_LOG_BY_EVENT_ID = "SELECT sequence FROM flowstore_log WHERE execution_id = ? AND event_id = ?"
_LOG_AFTER = _Sql(_STORED.select(
    "flowstore_log WHERE execution_id = ? AND sequence > ? {tenant} ORDER BY sequence LIMIT ?"
))
# The row that stands for a pruned end of the log (its position must not be given again) has no execution.
_LOG_FROM = _Sql(_STORED.select(
    "flowstore_log WHERE position > ? AND execution_id <> '' {tenant} ORDER BY position LIMIT ?"
))
_LOG_LAST = _Sql("SELECT sequence FROM flowstore_log WHERE execution_id = ? {tenant} ORDER BY sequence DESC LIMIT 1")
_EXECUTION_INSERT = (
    "INSERT INTO flowstore_executions (execution_id, tenant_id, created_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
)
_EXECUTION_OWNER = _Sql("SELECT tenant_id FROM flowstore_executions WHERE execution_id = ? {tenant}")
_TENANT_STATUS = "SELECT status FROM flowstore_tenants WHERE id = ?"

def _event_text(event: object, path: str) -> str:
    if not isinstance(event, dict):
        raise InvalidData(f"{path}: an event is a JSON object, not {type(event).__name__}")
    kind = event.get("type")
    if not isinstance(kind, str) or not kind:
        raise InvalidData(f"{path}.type: an event needs a non-empty text as its 'type'")
    return _json(event, path)

class _LogFacet(_Facet):
    """What the two views of the execution log share."""

    def _append_to(
        self, tx: _Tx, execution_id: str, tenant_id: str, last: int, event: str, expected: object, event_id: object
    ) -> int:
        """Append one event behind `last`, once per event id."""
        key = None
        if event_id is not None:
            key = _id(event_id, "event_id")
            known = tx.row(_LOG_BY_EVENT_ID, execution_id, key)
            if known is not None:
                return int(known[0])
        if expected is not None and last != _int(expected, "expected_sequence", 0):
            raise SequenceConflict(execution_id, _int(expected, "expected_sequence"), last)
        tx.run(_LOG_INSERT, execution_id, last + 1, tenant_id, event, tx.now(), key)
        return last + 1

    def _events_after(self, tx: _Tx, execution_id: object, after: object, limit: int = _INT_MAX) -> list[StoredEvent]:
        execution, sequence = _id(execution_id, "execution_id"), _int(after, "after_seq")
        return _STORED.decode_all(self._rows(tx, _LOG_AFTER, execution, sequence, limit))

    def _last_sequence(self, tx: _Tx, execution_id: object) -> int | None:
        row = self._row(tx, _LOG_LAST, _id(execution_id, "execution_id"))
        return None if row is None else int(row[0])

    @_read
    def _chunk(self, tx: _Tx, execution_id: AnyId, after: int, limit: int) -> list[StoredEvent]:
        return self._events_after(tx, execution_id, after, limit)

class EventStore(_LogFacet):
    """The append-only log of executions. Source: EventStore."""

    @_write
    def append(
        self, tx: _Tx, execution_id: AnyId, tenant_id: AnyId, event: Mapping[str, Json], *, expected_sequence: int |
        None = None, event_id: AnyId | None = None
    ) -> int:
        """Append one event, durable when this returns; its sequence in the execution: 1, 2, 3, ... without gaps.

        The first append makes the execution known for that tenant, and registers a new one. An `event_id` that is in
        the log already returns its sequence and writes nothing. Raises TenantMismatch, TenantInactive, SequenceConflict
        (the log is not at `expected_sequence`; 0: no events yet), InvalidData. Source: EventStore.append."""
        execution, tenant = _id(execution_id, "execution_id"), _id(tenant_id, "tenant_id")
        text = _event_text(event, "event")
        last = self._open_log(tx, execution, tenant)
        return self._append_to(tx, execution, tenant, last, text, expected_sequence, event_id)

    @_write
    def append_batch(
        self, tx: _Tx, execution_id: AnyId, tenant_id: AnyId, events: Iterable[Mapping[str, Json]], *,
        expected_sequence: int | None = None
    ) -> int:
        """Append all of the events with consecutive sequences, or none; the first one's sequence.

        Raises as `append` does, and InvalidData for an empty batch. Source: EventStore.append_batch."""
        execution, tenant = _id(execution_id, "execution_id"), _id(tenant_id, "tenant_id")
        if not isinstance(events, (list, tuple)):
            raise InvalidData(f"events: a list of events is needed, not {type(events).__name__}")
        texts = [_event_text(event, f"events[{index}]") for index, event in enumerate(events)]
        if not texts:
            raise InvalidData("events: a batch needs at least one event")
        last = self._open_log(tx, execution, tenant)
        if expected_sequence is not None and last != _int(expected_sequence, "expected_sequence", 0):
            raise SequenceConflict(execution, expected_sequence, last)
        now = tx.now()
        rows = [(execution, last + 1 + index, tenant, text, now, None) for index, text in enumerate(texts)]
        tx.run_many(_LOG_INSERT, rows)
        return last + 1

    def _open_log(self, tx: _Tx, execution_id: str, tenant_id: str) -> int:
        """The last sequence of a log that this tenant may append to; the first time, make it known."""
        head = tx.rows(_LOG_HEAD.all, execution_id)
        if not head:
            row = tx.row(_TENANT_STATUS, tenant_id)
            now = tx.now()
            if row is None:
                _add_tenant(tx, tenant_id)
            elif row[0] != TenantStatus.ACTIVE:
                raise TenantInactive(tenant_id)
            tx.run(_EXECUTION_INSERT, execution_id, tenant_id, now)
            return 0
        owner, status, last = head[0]
        if owner != tenant_id:
            raise TenantMismatch(execution_id, tenant_id)
        if status != "active":
            raise TenantInactive(tenant_id)
        return last or 0

    @_read
    def load_events(self, tx: _Tx, execution_id: AnyId) -> list[StoredEvent]:
        """All events of an execution, by sequence. Source: EventStore.load_events."""
        return self._events_after(tx, execution_id, 0)

    @_read
    def load_events_after(self, tx: _Tx, execution_id: AnyId, after_seq: int) -> list[StoredEvent]:
        """The events with a sequence above `after_seq`. Source: EventStore.load_events_after."""
        return self._events_after(tx, execution_id, after_seq)

    @_read
    def get_latest_sequence(self, tx: _Tx, execution_id: AnyId) -> int | None:
        """The last event's sequence, None when there are no events. Source: EventStore.get_latest_sequence."""
        return self._last_sequence(tx, execution_id)

    @_read
    def list_executions(
        self, tx: _Tx, tenant_id: AnyId = DEFAULT_TENANT, limit: int = 100, offset: int = 0
    ) -> list[str]:
        """The ids of the tenant's known executions, newest first. Source: EventStore.list_executions."""
        rows = tx.rows(
            "SELECT execution_id FROM flowstore_executions WHERE tenant_id = ? "
            "ORDER BY created_at DESC, execution_id DESC LIMIT ? OFFSET ?",
            _id(tenant_id, "tenant_id"), _limit(limit), _count(offset, "offset"),
        )
        return [execution_id for (execution_id,) in rows]

    @_read
    def execution_exists(self, tx: _Tx, execution_id: AnyId) -> bool:
        """True when the execution is known, with or without events. Source: EventStore.execution_exists."""
        return tx.row(_EXECUTION_OWNER.all, _id(execution_id, "execution_id")) is not None

    @_read
    def count_events(self, tx: _Tx, execution_id: AnyId) -> int:
        """How many events the execution has; sequences have no gaps, so the last one says. Source: count_events."""
        return self._last_sequence(tx, execution_id) or 0

    def iter_events(self, execution_id: AnyId, after_seq: int = 0, *, chunk: int = 1000) -> Iterator[StoredEvent]:
        """Generate the events after `after_seq`, reading `chunk` of them at a time: memory stays flat.

        Nothing is held between two chunks, so writes go on, and what they append is reached too. Raises InvalidData."""
        execution, after = _id(execution_id, "execution_id"), _int(after_seq, "after_seq")
        return self._iterate(execution, after, _int(chunk, "chunk", 1))

    def _iterate(self, execution_id: str, after: int, chunk: int) -> Iterator[StoredEvent]:
        while events := self._chunk(execution_id, after, chunk):
            yield from events
            after = events[-1].sequence

    @_read
    def read_all(
        self, tx: _Tx, after_position: int = 0, limit: int = 1000, *, tenant_id: AnyId | None = None
    ) -> list[StoredEvent]:
        """The whole log, or a tenant's part of it, by position: for projections that remember how far they are.

        An event that commits later never has a lower position than one already read."""
        after, most = _int(after_position, "after_position"), _limit(limit)
        if tenant_id is None:
            return _STORED.decode_all(tx.rows(_LOG_FROM.all, after, most))
        return _STORED.decode_all(tx.rows(_LOG_FROM.one, after, _id(tenant_id, "tenant_id"), most))

# --- the state backend ---
_RUN_BY_ID = _Sql(_RUN.select("flowstore_runs WHERE execution_id = ? {tenant}"))
_RUNS, _RUNS_BY_STATUS = (_Sql(_RUN.select(
    f"flowstore_runs WHERE {which} {{tenant}} ORDER BY updated_at DESC, execution_id DESC LIMIT ? OFFSET ?"
)) for which in ("true", "status = ?"))
_RUN_SET_STATUS = _Sql(
    """UPDATE flowstore_runs SET status = ?, updated_at = ?, completed_at = COALESCE(completed_at, ?)
    WHERE execution_id = ? {tenant} RETURNING execution_id"""
)
_RUN_SET_STATE = _Sql(
    "UPDATE flowstore_runs SET current_state = ?, updated_at = ? WHERE execution_id = ? {tenant} RETURNING execution_id"
)
_SNAPSHOT_LATEST = _Sql(_SNAPSHOT.select(
    "flowstore_snapshots WHERE execution_id = ? AND at_sequence <= ? {tenant} ORDER BY at_sequence DESC LIMIT 1"
))
# An id is taken whoever took it: this one asks without regard to tenants.
_SNAPSHOT_PLACE = "SELECT execution_id, at_sequence FROM flowstore_snapshots WHERE id = ?"
_SNAPSHOT_WRITE = (
    f"INSERT INTO flowstore_snapshots ({_SNAPSHOT.columns}, tenant_id) VALUES (?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (execution_id, at_sequence) DO UPDATE SET state = excluded.state, id = excluded.id, "
    "created_at = excluded.created_at"
)
_SNAPSHOT_PRUNE = _Sql(
    """DELETE FROM flowstore_snapshots WHERE execution_id = ? {tenant} AND at_sequence <= (
        SELECT at_sequence FROM flowstore_snapshots WHERE execution_id = ? {tenant}
        ORDER BY at_sequence DESC LIMIT 1 OFFSET ?)
    RETURNING id"""
)
_ITEM_BY_ID = _Sql(_ITEM.select("flowstore_work_items WHERE id = ? {tenant}"))
_CLAIM = _Sql(
    """UPDATE flowstore_work_items SET status = 'claimed', worker_id = ?, lease_expires_at = ?,
        lease_fence = lease_fence + 1
    WHERE id = ? AND status = 'pending' {tenant} RETURNING {columns}""",
    columns=_ITEM.columns,
)
_EXPIRED = _Sql(_ITEM.select(
    """flowstore_work_items WHERE queue_type = ? AND status = 'claimed' AND lease_expires_at <= ? {tenant}
    ORDER BY lease_expires_at, id LIMIT ?"""
))
_NEXT_LEASED_QUEUE = _Sql(
    """SELECT queue_type FROM flowstore_work_items WHERE status = 'claimed' AND queue_type > ? {tenant}
    ORDER BY queue_type LIMIT 1"""
)
_RENEW = _Sql(
    """UPDATE flowstore_work_items SET lease_expires_at = ?
    WHERE id = ? AND status = 'claimed' AND lease_fence = COALESCE(?, lease_fence)
        AND worker_id = COALESCE(?, worker_id) {tenant}
    RETURNING lease_expires_at"""
)
_SETTLE = _Sql(
    """UPDATE flowstore_work_items SET status = ?, lease_expires_at = NULL, last_error = COALESCE(?, last_error)
    WHERE id = ? AND status <> 'dead_lettered' {tenant} RETURNING {columns}""",
    columns=_ITEM.columns,
)
_SETTLE_FENCED = _Sql(
    """UPDATE flowstore_work_items SET status = ?, lease_expires_at = NULL, last_error = COALESCE(?, last_error)
    WHERE id = ? AND status = 'claimed' AND lease_fence = ? {tenant} RETURNING {columns}""",
    columns=_ITEM.columns,
)
_RETRY = _Sql(
    """UPDATE flowstore_work_items SET status = 'pending', attempt = ?, available_at = ?, worker_id = NULL,
        lease_expires_at = NULL, last_error = COALESCE(?, last_error)
    WHERE id = ? {tenant} RETURNING {columns}""",
    columns=_ITEM.columns,
)
_BURY = _Sql(
    """UPDATE flowstore_work_items SET status = 'dead_lettered', attempt = ?, dead_lettered_at = ?, worker_id = NULL,
        lease_expires_at = NULL, last_error = COALESCE(?, last_error)
    WHERE id = ? {tenant} RETURNING {columns}""",
    columns=_DEAD.columns,
)
_DEAD_LETTERS = _Sql(_DEAD.select(
    """flowstore_work_items WHERE status = 'dead_lettered' {tenant}
    ORDER BY dead_lettered_at DESC, id DESC LIMIT ? OFFSET ?"""
))
_DEFINITION_GET = _Sql(_DEFINITION.select("flowstore_definitions WHERE workflow_id = ? AND version = ? {tenant}")).one
_DEFINITION_DROP = _Sql("DELETE FROM flowstore_definitions WHERE workflow_id = ? AND version = ? {tenant}").one
# Counts for a tenant's limits, made only where it has one.
_DEFINITIONS_KEPT = _Sql("SELECT COUNT(*) FROM flowstore_definitions WHERE true {tenant}").one
_RUNS_OPEN = _Sql("SELECT COUNT(*) FROM flowstore_runs WHERE status IN ('pending', 'running', 'paused') {tenant}").one
_EFFECT_INSERT = (
    "INSERT INTO flowstore_effects (tenant_id, key, result, execution_id) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
_EFFECT_GET = _Sql("SELECT result FROM flowstore_effects WHERE key = ? {tenant}").one
_ARTIFACT_REF = _Sql(_ARTIFACT.select("flowstore_artifacts WHERE hash = ? {tenant}")).one
_ARTIFACT_GET = _Sql("SELECT data FROM flowstore_artifacts WHERE hash = ? {tenant}").one
_TOKEN_VALID = _Sql(_TOKEN.select(
    """flowstore_tokens WHERE hash = ? AND revoked_at IS NULL AND COALESCE(expires_at > ?, true) {tenant}
    AND EXISTS (SELECT 1 FROM flowstore_tenants t WHERE t.id = tenant_id AND t.status = 'active')"""
))
_REVOKE = _Sql("UPDATE flowstore_tokens SET revoked_at = COALESCE(revoked_at, ?) WHERE id = ? {tenant} RETURNING id")
_TOKENS = _Sql(_TOKEN.select("flowstore_tokens WHERE true {tenant} ORDER BY created_at DESC, id DESC"))
_TENANT_BY_ID = _TENANT.select("flowstore_tenants WHERE id = ?")
_TENANT_UPDATE = f"{_TENANT.update('flowstore_tenants', 'created_at')} RETURNING {_TENANT.columns}"
_TENANTS = _TENANT.select("flowstore_tenants ORDER BY created_at, id")
_RECLAIMED_PER_CLAIM = 16

@functools.cache
def _look_sql(queues: int) -> _Sql:
    """For each queue: the item available longest (its time and id), and one whose lease has expired; a seek each."""
    head = """SELECT {} FROM flowstore_work_items WHERE status = 'pending' AND queue_type = q.column1
        AND available_at <= ? {{tenant}} ORDER BY available_at, id LIMIT 1""".format
    return _Sql(
        f"""SELECT q.column1, ({head('available_at')}), ({head('id')}), (SELECT id FROM flowstore_work_items
            WHERE status = 'claimed' AND queue_type = q.column1 AND lease_expires_at <= ? {{tenant}}
            ORDER BY lease_expires_at, id LIMIT 1)
        FROM (VALUES {', '.join(['(?)'] * queues)}) q"""
    )

@functools.cache
def _items_sql(*filters: str) -> _Sql:
    return _Sql(
        f"""SELECT {_ITEM.columns} FROM flowstore_work_items WHERE true
        {' '.join(f'AND {name} = ?' for name in filters)} {{tenant}} ORDER BY available_at, id LIMIT ? OFFSET ?"""
    )

class StateBackend(_LogFacet):
    """Executions, queue, tenants and theirs; `for_tenant` alone isolates. Source: StateBackend, SqliteBackend."""

    def _admit(self, tx: _Tx, writes: bool) -> None:
        """Refuse an operation that the tenant of this view may not do."""
        tenant = str(self._tenant)
        if _found(tx.row(_TENANT_STATUS, tenant), "tenant", tenant)[0] != TenantStatus.ACTIVE and writes:
            raise TenantInactive(tenant)

    def _obey(self, tx: _Tx, tenant: str, limit: str, count: str, added: bool) -> None:
        """After a write: NotFound for an unregistered tenant, LimitExceeded when that was one row too many."""
        record = _TENANT.decode(_found(tx.row(_TENANT_BY_ID, tenant), "tenant", tenant))
        most = getattr(record.limits, limit)
        if added and most is not None and tx.rows(count, tenant)[0][0] > most:
            raise LimitExceeded(tenant)

    def _owner(self, tx: _Tx, execution_id: str) -> str:
        """The tenant of a known execution; NotFound for others."""
        return str(_found(self._row(tx, _EXECUTION_OWNER, execution_id), "execution", execution_id)[0])

    # --- executions ---
    @_write
    def create_execution(self, tx: _Tx, execution: WorkflowExecution) -> WorkflowExecution:
        """Store the record of a new execution, which the log may know already, and return it.

        Raises AlreadyExists for an id that has a record or is another tenant's, NotFound for an unregistered tenant,
        LimitExceeded beyond its `max_concurrent_executions`. Source: StateBackend.create_execution."""
        now = tx.now()
        values = _stamped(_RUN.encode(execution, argument="execution"), now, "started_at", "updated_at")
        values["tenant_id"] = tenant = self._tenant or values["tenant_id"]
        execution_id = values["execution_id"]
        tx.run(_EXECUTION_INSERT, execution_id, tenant, now)
        owner = tx.row(_EXECUTION_OWNER.all, execution_id)
        if owner != (tenant,) or not tx.run(_RUN.insert("flowstore_runs"), *values.values()):
            raise AlreadyExists("execution", execution_id)
        stored = _RUN.decode(values.values())
        self._obey(tx, tenant, "max_concurrent_executions", _RUNS_OPEN, not stored.status.is_terminal)
        return stored

    @_read
    def get_execution(self, tx: _Tx, id: AnyId) -> WorkflowExecution | None:
        """The record of an execution, or None. Source: StateBackend.get_execution."""
        return _RUN.maybe(self._row(tx, _RUN_BY_ID, _id(id, "id")))

    @_read
    def list_executions(
        self, tx: _Tx, status: ExecutionStatus | str | None = None, limit: int = 100, offset: int = 0
    ) -> list[WorkflowExecution]:
        """Executions with a record, newest `updated_at` first. Source: StateBackend.list_executions."""
        page = _limit(limit), _count(offset, "offset")
        if status is None:
            return _RUN.decode_all(self._rows(tx, _RUNS, *page))
        return _RUN.decode_all(self._rows(tx, _RUNS_BY_STATUS, _enum(ExecutionStatus, status, "status").value, *page))

    @_write
    def update_execution_status(self, tx: _Tx, id: AnyId, status: ExecutionStatus | str) -> None:
        """Set the status and `updated_at`, and `completed_at` at the first terminal status; no transition is checked.

        Raises NotFound. Source: StateBackend.update_execution_status."""
        execution_id, new, now = _id(id, "id"), _enum(ExecutionStatus, status, "status"), tx.now()
        done = now if new.is_terminal else None
        _found(self._row(tx, _RUN_SET_STATUS, new.value, now, done, execution_id), "execution", execution_id)

    @_write
    def update_execution_current_state(self, tx: _Tx, id: AnyId, state: Json) -> None:
        """Replace the whole state, without a merge, and set `updated_at`.

        Raises NotFound. Source: StateBackend.update_execution_current_state."""
        execution_id, text = _id(id, "id"), _json(state, "state")
        _found(self._row(tx, _RUN_SET_STATE, text, tx.now(), execution_id), "execution", execution_id)

    @_write
    def patch_append_array(self, tx: _Tx, id: AnyId, key: str, value: Json) -> None:
        """Append a value to an array in the state, making it if it is not there: one step, however many callers race.

        Raises NotFound, and InvalidData for a state that is no object or a member that is no array.
        Source: StateBackend.patch_append_array."""
        execution_id, member = _id(id, "id"), _text(key, "key")
        _json(value, "value")
        state = _RUN.decode(_found(self._row(tx, _RUN_BY_ID, execution_id), "execution", execution_id)).current_state
        if not isinstance(state, dict):
            raise InvalidData(f"current_state: an array can only be kept in an object, not in {type(state).__name__}")
        array = state.setdefault(member, [])
        if not isinstance(array, list):
            raise InvalidData(f"current_state.{member}: cannot append to {type(array).__name__}")
        array.append(value)
        self._row(tx, _RUN_SET_STATE, _json(state, "current_state"), tx.now(), execution_id)

    # --- the log ---
    @_write
    def append_event(
        self, tx: _Tx, execution_id: AnyId, event: Mapping[str, Json], *, expected_sequence: int | None = None,
        event_id: AnyId | None = None
    ) -> int:
        """Append one event under the execution's tenant; its sequence. Otherwise as `EventStore.append`.

        Raises NotFound for an unknown execution, SequenceConflict. Source: StateBackend.append_event."""
        execution, text = _id(execution_id, "execution_id"), _event_text(event, "event")
        owner, _, last = _found(self._row(tx, _LOG_HEAD, execution), "execution", execution)
        return self._append_to(tx, execution, owner, last or 0, text, expected_sequence, event_id)

    @_read
    def get_events(self, tx: _Tx, execution_id: AnyId) -> list[StoredEvent]:
        """All events of an execution, by sequence. Source: StateBackend.get_events."""
        return self._events_after(tx, execution_id, 0)

    @_read
    def get_events_since(self, tx: _Tx, execution_id: AnyId, since_sequence: int) -> list[StoredEvent]:
        """The events with a sequence above `since_sequence`. Source: StateBackend.get_events_since."""
        return self._events_after(tx, execution_id, _int(since_sequence, "since_sequence"))

    @_read
    def latest_sequence(self, tx: _Tx, execution_id: AnyId) -> int:
        """The last event's sequence, 0 when there are no events. Source: StateBackend.latest_sequence."""
        return self._last_sequence(tx, execution_id) or 0

    # --- snapshots ---
    @_write
    def write_snapshot(self, tx: _Tx, snapshot: Snapshot) -> Snapshot:
        """Store a snapshot and return it; the same `at_sequence` again replaces.

        Raises NotFound for an unknown execution, InvalidData for a sequence below 0. Source: write_snapshot."""
        values = _stamped(_SNAPSHOT.encode(snapshot, argument="snapshot"), tx.now(), "created_at")
        _int(values["at_sequence"], "at_sequence", 0)
        tenant = self._owner(tx, values["execution_id"])
        place = tx.row(_SNAPSHOT_PLACE, values["id"])
        if place not in (None, (values["execution_id"], values["at_sequence"])):
            raise AlreadyExists("snapshot", values["id"])
        tx.run(_SNAPSHOT_WRITE, *values.values(), tenant)
        return _SNAPSHOT.decode(values.values())

    @_read
    def latest_snapshot(self, tx: _Tx, execution_id: AnyId) -> Snapshot | None:
        """The snapshot with the highest `at_sequence`, or None. Source: StateBackend.latest_snapshot."""
        return _SNAPSHOT.maybe(self._row(tx, _SNAPSHOT_LATEST, _id(execution_id, "execution_id"), _INT_MAX))

    @_write
    def prune_snapshots(self, tx: _Tx, execution_id: AnyId, keep: int = 1) -> int:
        """Drop all but the newest `keep` snapshots of an execution; how many went."""
        execution = _id(execution_id, "execution_id")
        return len(self._rows(tx, _SNAPSHOT_PRUNE, execution, execution, _count(keep, "keep")))

    @_steps
    def replay(
        self, execution_id: AnyId, reducer: Callable[[Any, StoredEvent], Any], initial: Json = None
    ) -> Generator[Any, Any, tuple[Any, int]]:
        """Fold `reducer(state, event)` over the events after the latest snapshot; the state and its sequence.

        Starts from the snapshot's state, or from `initial` when there is none. The reducer runs outside transactions.
        """
        state, sequence = (yield self._replay_start(execution_id)) or (initial, 0)
        while events := (yield self._chunk(execution_id, sequence, 1000)):
            for event in events:
                state = yield reducer(state, event)
            sequence = events[-1].sequence
        return state, sequence

    @_snapshot
    def _replay_start(self, tx: _Tx, execution_id: AnyId) -> tuple[Any, int] | None:
        """The state and sequence of the latest snapshot that does not lie beyond the log's end."""
        execution = _id(execution_id, "execution_id")
        last = self._last_sequence(tx, execution) or 0
        snapshot = _SNAPSHOT.maybe(self._row(tx, _SNAPSHOT_LATEST, execution, last))
        return None if snapshot is None else (snapshot.state, snapshot.at_sequence)

    # --- the work queue ---
    @_write
    def enqueue_work_item(self, tx: _Tx, item: WorkItem) -> str:
        """Put an item into its queue; its id. It is available from `available_at` on (default: `created_at`).

        It takes its execution's tenant and starts pending, whatever the record says. Raises NotFound for an unknown
        execution, AlreadyExists for an id that any item has or had. Source: StateBackend.enqueue_work_item."""
        values = _stamped(_ITEM.encode(item, argument="item"), tx.now(), "created_at")
        for name in ("attempt", "max_attempts"):
            _int(values[name], name, 0, 2**31 - 1)
        values["tenant_id"] = self._owner(tx, values["execution_id"])
        values = _stamped(values, values["created_at"], "available_at")
        values |= dict.fromkeys(("lease_expires_at", "worker_id", "last_error"))
        values |= {"lease_fence": 0, "status": "pending"}
        if not tx.run(_ITEM.insert("flowstore_work_items"), *values.values()):
            raise AlreadyExists("work item", values["id"])
        return str(values["id"])

    @_read
    def get_work_item(self, tx: _Tx, item_id: AnyId | WorkItem) -> WorkItem | None:
        """The item as it is now, or None."""
        return self._item(tx, _item_id(item_id))

    def _item(self, tx: _Tx, item_id: str) -> WorkItem | None:
        return _ITEM.maybe(self._row(tx, _ITEM_BY_ID, item_id))

    @_read
    def list_work_items(
        self, tx: _Tx, *, status: WorkItemStatus | str | None = None, queue_type: AnyId | None = None, execution_id:
        AnyId | None = None, limit: int = 100, offset: int = 0
    ) -> list[WorkItem]:
        """Items, oldest `available_at` first, filtered by what is given."""
        filters = {}
        if status is not None:
            filters["status"] = _enum(WorkItemStatus, status, "status").value
        if queue_type is not None:
            filters["queue_type"] = _id(queue_type, "queue_type")
        if execution_id is not None:
            filters["execution_id"] = _id(execution_id, "execution_id")
        page = _limit(limit), _count(offset, "offset")
        return _ITEM.decode_all(self._rows(tx, _items_sql(*filters), *filters.values(), *page))

    @_steps
    def claim_work_item(
        self, worker_id: AnyId, queue_types: Sequence[AnyId], *, lease_seconds: float | None = None, wait: float = 0.0
    ) -> Generator[Any, Any, WorkItem | None]:
        """Lease the item of these queues that has been available longest, to this worker alone; None without one.

        The item carries a new `lease_fence`, greater than any before. First, expired leases of these queues (some of
        them, per call) are taken back. Waits up to `wait` seconds for an item, not at all inside a transaction.
        Raises InvalidData. Source: StateBackend.claim_work_item."""
        worker = _id(worker_id, "worker_id")
        if not isinstance(queue_types, (list, tuple, set, frozenset)):
            raise InvalidData(f"queue_types: a list of queues is needed, not {type(queue_types).__name__}")
        queues = list({_id(queue, f"queue_types[{index}]"): None for index, queue in enumerate(queue_types)})
        lease = self._lease(lease_seconds)
        deadline = time.monotonic() + min(_seconds(wait, "wait"), threading.TIMEOUT_MAX)
        while True:
            seen = self._engine.commits
            item: WorkItem | None = yield self._claim(worker, queues, lease)
            if item is not None or not queues:
                return item
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or self._engine.block() is not None:
                    return None
                if (yield self._claimable(queues)):
                    break
                yield self._engine.wait(seen, left)
                seen = self._engine.commits

    @_write_row
    def _claim(self, tx: _Tx, worker_id: str, queues: list[str], lease: float) -> WorkItem | None:
        now = tx.now()
        expires, looks = _after(now, lease, "lease_seconds"), self._look(tx, queues, now)
        if overdue := [queue for queue, _, _, lapsed in looks if lapsed is not None]:
            for queue in overdue:
                for row in self._rows(tx, _EXPIRED, queue, now, _RECLAIMED_PER_CLAIM):
                    self._try_again(tx, _ITEM.decode(row), now, "the lease expired")
            looks = self._look(tx, queues, now)
        while heads := [(available, item_id) for _, available, item_id, _ in looks if item_id is not None]:
            if (claimed := self._row(tx, _CLAIM, worker_id, expires, min(heads)[1])) is not None:
                return _ITEM.decode(claimed)
            looks = self._look(tx, queues, now)  # where writers run side by side, another one took it
        return None

    def _look(self, tx: _Tx, queues: list[str], now: int) -> list[tuple[Any, ...]]:
        return self._rows(tx, _look_sql(len(queues)), now, now, now, *queues) if queues else []

    @_read
    def _claimable(self, tx: _Tx, queues: list[str]) -> bool:
        """Whether a claim would find something to do: idle waiters look with reads and never take the writer."""
        return any(head is not None or lapsed is not None for _, _, head, lapsed in self._look(tx, queues, tx.now()))

    def _backoff(self, attempt: int) -> float:
        """Seconds until the next try; the default stands in for a function that fails."""
        seconds: object = None
        if self._engine.options.backoff is not None:
            with contextlib.suppress(Exception):
                seconds = self._engine.options.backoff(attempt)
        try:
            return _seconds(seconds, "backoff")
        except InvalidData:
            return float(2 ** min(attempt, 6))

    def _try_again(
        self, tx: _Tx, item: WorkItem, now: int, error: str | None, delay: float | None = None
    ) -> WorkItem | DeadLetter:
        """Count an attempt: pending again after the delay, or a dead letter when that was the last."""
        attempt = min(item.attempt + 1, 2**31 - 1)
        if attempt >= item.max_attempts:
            return self._bury(tx, item.id, attempt, now, error)
        seconds = min(self._backoff(attempt) if delay is None else delay, (_LAST_TIME - now) / 1e6)
        # An expired lease says less than the error of an earlier attempt.
        last_error = None if error == "the lease expired" and item.last_error else error
        row = self._row(tx, _RETRY, attempt, now + round(seconds * 1e6), last_error, item.id)
        return _ITEM.decode(row or ())

    def _bury(self, tx: _Tx, item_id: str, attempt: int, now: int, error: str | None) -> DeadLetter:
        return _DEAD.decode(self._row(tx, _BURY, attempt, now, error, item_id) or ())

    @_write_row
    def renew_lease(
        self, tx: _Tx, item_id: AnyId | WorkItem, worker_id: AnyId | None = None, *, lease_fence: int | None = None,
        lease_seconds: float | None = None
    ) -> datetime:
        """Lease the item anew from now on; the new expiry.

        Raises LeaseLost when it is not leased to this worker or under this fence, NotFound. Source: renew_lease."""
        item, fence = _item_id(item_id), _fence(item_id, lease_fence)
        if worker_id is None and isinstance(item_id, WorkItem):
            worker_id = item_id.worker_id
        worker = None if worker_id is None else _id(worker_id, "worker_id")
        expires = _after(tx.now(), self._lease(lease_seconds), "lease_seconds")
        if self._row(tx, _RENEW, expires, item, fence, worker) is None:
            raise self._not_held(tx, item)
        return _datetime(expires)

    def _not_held(self, tx: _Tx, item_id: str) -> FlowStoreError:
        """Why a change of an item found nothing to change."""
        return NotFound("work item", item_id) if self._row(tx, _ITEM_BY_ID, item_id) is None else LeaseLost(item_id)

    def hold(self, item: WorkItem, *, lease_seconds: float | None = None) -> Hold:
        """A context manager that renews the item's lease in the background, every third of it, while the block runs.

        Raises LeaseLost at the end of the block if the lease was lost; `.lost` tells meanwhile."""
        return Hold(self, _is(WorkItem, item, "item"), self._lease(lease_seconds))

    @_write_row
    def complete_work_item(self, tx: _Tx, item_id: AnyId | WorkItem, *, lease_fence: int | None = None) -> WorkItem:
        """The work is done: settle the item under its fence, and return it.

        With a fence (or the claimed item itself): LeaseLost, and nothing changed, unless claimed under that fence.
        Without: any item but a dead letter (LeaseLost). Raises NotFound. Source: StateBackend.complete_work_item."""
        return self._settle(tx, WorkItemStatus.COMPLETED, item_id, lease_fence)

    @_write_row
    def fail_work_item(
        self, tx: _Tx, item_id: AnyId | WorkItem, error: str, *, lease_fence: int | None = None
    ) -> WorkItem:
        """The work failed for good: settle the item, `error` as its `last_error`, by the rules of `complete_work_item`.

        It stays failed until someone calls `retry_work_item`. Source: StateBackend.fail_work_item."""
        return self._settle(tx, WorkItemStatus.FAILED, item_id, lease_fence, _text(error, "error"))

    def _settle(
        self, tx: _Tx, status: WorkItemStatus, item_id: AnyId | WorkItem, fence: object, error: str | None = None
    ) -> WorkItem:
        item, held = _item_id(item_id), _fence(item_id, fence)
        if held is None:
            row = self._row(tx, _SETTLE, status.value, error, item)
        else:
            row = self._row(tx, _SETTLE_FENCED, status.value, error, item, held)
        if row is None:
            raise self._not_held(tx, item)
        return _ITEM.decode(row)

    @_write_row
    def retry_work_item(
        self, tx: _Tx, item_id: AnyId | WorkItem, error: str | None = None, *, delay: float | None = None, lease_fence:
        int | None = None
    ) -> WorkItem | DeadLetter:
        """The attempt failed: pending again after `delay` seconds (None: the store's backoff), or a dead letter.

        Counts an attempt; the last one of `max_attempts` makes the dead letter. Raises LeaseLost unless the item is
        claimed or failed (under the fence, if one is given), NotFound."""
        item_key, fence = _item_id(item_id), _fence(item_id, lease_fence)
        text = None if error is None else _text(error, "error")
        now = tx.now()
        seconds = None if delay is None else _seconds(delay, "delay")
        if seconds is not None:
            _after(now, seconds, "delay")
        item = _found(self._item(tx, item_key), "work item", item_key)
        held = item.status in (WorkItemStatus.CLAIMED, WorkItemStatus.FAILED)
        if not held or (fence is not None and fence != item.lease_fence):
            raise LeaseLost(item_key)
        return self._try_again(tx, item, now, text, seconds)

    @_write
    def reclaim_expired_leases(self, tx: _Tx) -> ReclaimResult:
        """Take back every expired lease, in one transaction: each counts an attempt.

        Below `max_attempts` the item is pending again after the store's backoff, else a dead letter. Claims do this
        by themselves for their queues. Source: StateBackend.reclaim_expired_leases."""
        now, queue, result = tx.now(), "", ReclaimResult()
        while (following := self._row(tx, _NEXT_LEASED_QUEUE, queue)) is not None:
            queue = str(following[0])
            for row in self._rows(tx, _EXPIRED, queue, now, _INT_MAX):
                outcome = self._try_again(tx, _ITEM.decode(row), now, "the lease expired")
                if isinstance(outcome, DeadLetter):
                    result.exhausted.append(outcome)
                else:
                    result.retryable.append(outcome)
        return result

    @_write
    def move_to_dead_letter(self, tx: _Tx, item_id: AnyId | WorkItem, last_error: str) -> DeadLetter:
        """Give an item up: no claim finds it any more.

        Raises LeaseLost for a completed item, or one that is not the claim it was given as; NotFound.
        Source: StateBackend.move_to_dead_letter."""
        item_key, fence, error = _item_id(item_id), _fence(item_id, None), _text(last_error, "last_error")
        item = _found(self._item(tx, item_key), "work item", item_key)
        settled = item.status in (WorkItemStatus.COMPLETED, WorkItemStatus.DEAD_LETTERED)
        if settled or (fence is not None and fence != item.lease_fence):
            raise LeaseLost(item_key)
        return self._bury(tx, item_key, item.attempt, tx.now(), error)

    @_read
    def list_dead_letters(self, tx: _Tx, limit: int = 100, offset: int = 0) -> list[DeadLetter]:
        """Dead letters, newest first."""
        return _DEAD.decode_all(self._rows(tx, _DEAD_LETTERS, _limit(limit), _count(offset, "offset")))

    @_write
    def requeue_dead_letter(self, tx: _Tx, item_id: AnyId | WorkItem | DeadLetter) -> WorkItem:
        """Make a dead letter a pending item again, available now, at attempt 0. Raises NotFound for anything else."""
        item = self._item(tx, key := _item_id(item_id))
        if item is None or item.status is not WorkItemStatus.DEAD_LETTERED:
            raise NotFound("dead letter", key)
        return _ITEM.decode(self._row(tx, _RETRY, 0, tx.now(), None, key) or ())

    @_write
    def commit_turn(
        self, tx: _Tx, item_id: AnyId | WorkItem, lease_fence: int | None, event: Mapping[str, Json], *,
        failed: bool = False, snapshot_state: Json = ..., effect_key: AnyId | None = None, effect: Json = None,
        expected_sequence: int | None = None, event_id: AnyId | None = None
    ) -> int:
        """Settle the item under its fence, append the event, keep snapshot and effect where given, all or nothing.

        Returns the event's sequence; a known `event_id` has its own. Raises LeaseLost, NotFound, SequenceConflict."""
        fence, text = _int(_fence(item_id, lease_fence), "lease_fence"), _event_text(event, "event")
        if effect is not None and effect_key is None:
            raise InvalidData("effect: it is found again by its effect_key: give one")
        key, result = None if effect_key is None else _id(effect_key, "effect_key"), _json(effect, "effect")
        state = None if snapshot_state is ... else _json(snapshot_state, "snapshot_state")
        status = WorkItemStatus.FAILED if _bool(failed, "failed") else WorkItemStatus.COMPLETED
        item = self._settle(tx, status, item_id, fence)
        execution, tenant, last = item.execution_id, item.tenant_id, self._last_sequence(tx, item.execution_id) or 0
        sequence = self._append_to(tx, execution, tenant, last, text, expected_sequence, event_id)
        if state is not None:
            tx.run(_SNAPSHOT_WRITE, execution, sequence, state, new_id(), tx.now(), tenant)
        if key is not None:
            tx.run(_EFFECT_INSERT, tenant, key, result, execution)
        return sequence

    # --- definitions, effects, artifacts ---
    @_write
    def store_workflow(self, tx: _Tx, definition: WorkflowDefinition) -> WorkflowDefinition:
        """Store a definition, or replace it. Raises NotFound (tenant), LimitExceeded. Source: store_workflow."""
        values = _stamped(_DEFINITION.encode(definition, argument="definition"), tx.now(), "created_at")
        values["tenant_id"] = tenant = self._tenant or values["tenant_id"]
        replaced = tx.run(_DEFINITION_DROP, values["workflow_id"], values["version"], tenant)
        tx.run(_DEFINITION.insert("flowstore_definitions"), *values.values())
        self._obey(tx, tenant, "max_workflows", _DEFINITIONS_KEPT, not replaced)
        return _DEFINITION.decode(values.values())

    @_read
    def get_workflow(self, tx: _Tx, workflow_id: AnyId, version: str) -> WorkflowDefinition | None:
        """The definition, or None. Source: StateBackend.get_workflow."""
        place = _id(workflow_id, "workflow_id"), _text(version, "version"), self._tenant or DEFAULT_TENANT
        return _DEFINITION.maybe(tx.row(_DEFINITION_GET, *place))

    @_write
    def record_effect(self, tx: _Tx, key: AnyId, result: Json, *, execution_id: AnyId | None = None) -> Json:
        """Keep a result if there is none under the key yet; the one that is kept. Raises NotFound (execution)."""
        name, tenant, text = _id(key, "key"), self._tenant or DEFAULT_TENANT, _json(result, "result")
        execution = None if execution_id is None else _id(execution_id, "execution_id")
        if execution is not None:
            self._owner(tx, execution)
        tx.run(_EFFECT_INSERT, tenant, name, text, execution)
        return _of_json(tx.rows(_EFFECT_GET, name, tenant)[0][0])

    @_read
    def get_effect(self, tx: _Tx, key: AnyId, default: Json = None) -> Json:
        """The result kept under the key, else `default`. Source: get_tool_effect."""
        row = tx.row(_EFFECT_GET, _id(key, "key"), self._tenant or DEFAULT_TENANT)
        return default if row is None else _of_json(row[0])

    @_write
    def put_artifact(self, tx: _Tx, data: bytes, media_type: str | None = None) -> ArtifactRef:
        """Keep bytes under their SHA-256: once, however often they come, with the media type that came first."""
        digest, tenant = hashlib.sha256(_is(bytes, data, "data")).hexdigest(), self._tenant or DEFAULT_TENANT
        values = _ARTIFACT.encode(ArtifactRef(hash=digest, size=len(data), media_type=media_type)).values()
        tx.run(_ARTIFACT.insert("flowstore_artifacts", "tenant_id", "data"), *values, tenant, data)
        return _ARTIFACT.decode(tx.rows(_ARTIFACT_REF, digest, tenant)[0])

    @_read
    def get_artifact(self, tx: _Tx, hash: str) -> bytes | None:
        """The bytes with this SHA-256, in hex, or None."""
        row = tx.row(_ARTIFACT_GET, _text(hash, "hash"), self._tenant or DEFAULT_TENANT)
        return None if row is None else bytes(row[0])

    # --- tokens and tenants ---
    @_write
    def create_token(
        self, tx: _Tx, name: str, role: str, *, expires_at: datetime | None = None
    ) -> tuple[str, ApiToken]:
        """A new token: its plaintext, which is not stored (its SHA-256 is), and its record. Source: create_token."""
        info = ApiToken(id=new_id(), name=name, role=role, created_at=_datetime(tx.now()), expires_at=expires_at,
                        revoked_at=None, tenant_id=self._tenant or DEFAULT_TENANT)
        token, values = f"fs_{os.urandom(32).hex()}", _TOKEN.encode(info).values()
        tx.run(_TOKEN.insert("flowstore_tokens", "hash"), *values, hashlib.sha256(token.encode()).hexdigest())
        return token, _TOKEN.decode(values)

    @_read
    def validate_token(self, tx: _Tx, token: str) -> ApiToken | None:
        """A token's record, which names its tenant; None if unknown, revoked, expired, or the tenant is not active."""
        digest = hashlib.sha256(_text(token, "token").encode()).hexdigest()
        return _TOKEN.maybe(self._row(tx, _TOKEN_VALID, digest, tx.now()))

    @_write
    def revoke_token(self, tx: _Tx, token_id: AnyId) -> None:
        """Make a token invalid; again has no effect. Raises NotFound."""
        token = _id(token_id, "token_id")
        _found(self._row(tx, _REVOKE, tx.now(), token), "token", token)

    @_read
    def list_tokens(self, tx: _Tx) -> list[ApiToken]:
        """All tokens, revoked and expired ones too, newest first."""
        return _TOKEN.decode_all(self._rows(tx, _TOKENS))

    @_write
    def create_tenant(self, tx: _Tx, tenant: Tenant) -> Tenant:
        """Register a tenant. Raises AlreadyExists, in a view TenantMismatch. Source: StateBackend.create_tenant."""
        self._administer(_is(Tenant, tenant, "tenant").id)
        return _insert(tx, _TENANT, "flowstore_tenants", "tenant", tenant)

    @_read
    def get_tenant(self, tx: _Tx, id: AnyId) -> Tenant | None:
        """A tenant's record, or None; a view knows its own alone. Source: StateBackend.get_tenant."""
        tenant = _id(id, "id")
        return _TENANT.maybe(tx.row(_TENANT_BY_ID, tenant) if self._tenant in (None, tenant) else None)

    @_read
    def list_tenants(self, tx: _Tx) -> list[Tenant]:
        """All tenants, oldest first; a view knows its own alone. Source: StateBackend.list_tenants."""
        return _TENANT.decode_all(tx.rows(_TENANT_BY_ID, self._tenant) if self._tenant else tx.rows(_TENANTS))

    @_write
    def update_tenant(self, tx: _Tx, tenant: Tenant) -> Tenant:
        """Write a tenant's record. Raises NotFound, in a view TenantMismatch. Source: StateBackend.update_tenant."""
        values = _TENANT.encode(tenant, argument="tenant") | {"updated_at": tx.now()}
        tenant_id, _ = values.pop("id"), values.pop("created_at")
        self._administer(tenant_id)
        return _TENANT.decode(_found(tx.row(_TENANT_UPDATE, *values.values(), tenant_id), "tenant", tenant_id))

    def for_tenant(self, tenant_id: AnyId) -> StateBackend:
        """The view of one tenant: the same methods, its rows alone. In a view TenantMismatch. Source: for_tenant."""
        self._administer(tenant := _id(tenant_id, "tenant_id"))
        return type(self)(self._engine, tenant)

    def _administer(self, tenant_id: AnyId) -> None:
        if self._tenant is not None:
            raise TenantMismatch(str(tenant_id), self._tenant)

def _item_id(item: object) -> str:
    return _id(item.id if isinstance(item, (WorkItem, DeadLetter)) else item, "item_id")

def _fence(item: object, lease_fence: object) -> int | None:
    """The fence to check: the one given, else the claimed item's own."""
    if lease_fence is None:
        return _int(item.lease_fence, "lease_fence") if isinstance(item, WorkItem) else None
    return _int(lease_fence, "lease_fence")

class Hold:
    """`with state.hold(item)`: a lease that is renewed while the block runs."""

    def __init__(self, state: StateBackend, item: WorkItem, lease: float) -> None:
        self.lost = False
        self._state = state
        self._item = item
        self._lease_seconds = lease
        self._ended = threading.Event()
        self._expires: datetime | None = None
        self._thread = threading.Thread(target=self._renew, name="flowstore-hold", daemon=True)

    def __enter__(self) -> Hold:
        self._expires = self._state.renew_lease(self._item, lease_seconds=self._lease_seconds)
        if self._state._engine.block() is None:  # inside a transaction nobody else could renew before it ends
            self._thread.start()
        return self

    def _renew(self) -> None:
        while not self._ended.wait(max(0.01, self._lease_seconds / 3)):
            if not self._still_held():
                return

    def _still_held(self) -> bool:
        try:
            self._expires = self._state.renew_lease(self._item, lease_seconds=self._lease_seconds)
            return True
        except (LeaseLost, NotFound):
            self.lost = self._gone()
            return False
        except FlowStoreError:
            return True  # busy, full, a suspended tenant: the lease may still last until the next try

    def _gone(self) -> bool:
        """Whether a lease that cannot be renewed was lost, and not ended by the block itself."""
        item, now = self._state.get_work_item(self._item), self._state._engine.now()
        if item is None or item.lease_fence != self._item.lease_fence or item.status is WorkItemStatus.CLAIMED:
            return True
        if item.status in (WorkItemStatus.COMPLETED, WorkItemStatus.FAILED):
            return False
        return self._expires is None or now >= self._expires  # before that, only the block can have put it back

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            if not self.lost:
                self._still_held()
        if self.lost and kind is None:
            raise LeaseLost(self._item.id)

# --- workflow persistence ---
_INSTANCES = f"SELECT {_INSTANCE.columns} FROM workflows WHERE id IN ({{}}) ORDER BY id"
_INSTANCE_BY_NAME = "SELECT id FROM workflows WHERE name = ?"
_INSTANCE_CHANGED = tuple(name for name in _INSTANCE.names if name not in ("id", "create_time"))
_INSTANCE_UPDATE = f"UPDATE workflows SET {' = ?, '.join(_INSTANCE_CHANGED)} = ?, stamp = ? WHERE id = ?"
_INSTANCES_OLD = """SELECT id FROM workflows WHERE status = ? AND COALESCE(complete_time, create_time) < ?
    ORDER BY COALESCE(complete_time, create_time), id LIMIT 100"""
_COUNTER_NEXT = """INSERT INTO flowstore_counters (definition_id, value) VALUES (?, 1)
    ON CONFLICT (definition_id) DO UPDATE SET value = flowstore_counters.value + 1 RETURNING value"""
_POINTERS = f"""SELECT workflow_id, place, {_POINTER.columns} FROM execution_pointers WHERE workflow_id IN ({{}})
    ORDER BY workflow_id, place, id"""
_POINTER_WRITE = f"""INSERT INTO execution_pointers (workflow_id, place, {_POINTER.columns})
    VALUES ({', '.join('?' * (len(_POINTER.names) + 2))}) ON CONFLICT (workflow_id, id) DO UPDATE SET
    {', '.join(f'{name} = excluded.{name}' for name in ('place', *_POINTER.names) if name != 'id')}"""
_UNHELD = "(external_token IS NULL OR external_token_expiry <= ?)"
_HOLD_SUBSCRIPTION = f"""UPDATE event_subscriptions
    SET external_token = ?, external_worker_id = ?, external_token_expiry = ?
    WHERE id = ? AND terminated_at IS NULL AND {_UNHELD}"""
_LET_GO = """UPDATE event_subscriptions SET external_token = NULL, external_worker_id = NULL,
    external_token_expiry = NULL WHERE external_token = ? AND id = ?"""
_SUBSCRIPTIONS = f"""SELECT {_SUBSCRIPTION.columns} FROM event_subscriptions
    WHERE event_name = ? AND event_key = ? AND subscribe_as_of <= ? AND terminated_at IS NULL {{}}
    ORDER BY subscribe_as_of, id LIMIT ?"""
# A lease that has expired holds nothing: scheduling takes it away, so that its handler's late return finds it gone.
_FREE_COMMAND = "(scheduled_commands.lease_token IS NULL OR scheduled_commands.lease_expires_at <= ?)"
_SCHEDULE = f"""INSERT INTO scheduled_commands (command_name, data, execute_time) VALUES (?, ?, ?)
    ON CONFLICT (command_name, data) DO UPDATE SET
    execute_time = CASE WHEN {_FREE_COMMAND} AND excluded.execute_time < scheduled_commands.execute_time
        THEN excluded.execute_time ELSE scheduled_commands.execute_time END,
    again_at = CASE WHEN {_FREE_COMMAND} OR scheduled_commands.again_at < excluded.execute_time
        THEN scheduled_commands.again_at ELSE excluded.execute_time END,
    lease_token = CASE WHEN {_FREE_COMMAND} THEN NULL ELSE scheduled_commands.lease_token END"""
_DUE = f"""SELECT execute_time, command_name, data FROM scheduled_commands
    WHERE execute_time <= ? AND {_FREE_COMMAND} AND (execute_time, command_name, data) > (?, ?, ?)
    ORDER BY execute_time, command_name, data LIMIT 1"""
_LEASE = "UPDATE scheduled_commands SET lease_token = ?, lease_expires_at = ? WHERE command_name = ? AND data = ?"
_HELD = "WHERE lease_token = ? AND lease_expires_at > ? AND command_name = ? AND data = ?"
_AGAIN = f"""UPDATE scheduled_commands SET execute_time = again_at, again_at = NULL, lease_token = NULL
    {_HELD} AND again_at IS NOT NULL"""
_GIVE_BACK = """UPDATE scheduled_commands SET again_at = NULL, lease_token = NULL,
    execute_time = CASE WHEN again_at < execute_time THEN again_at ELSE execute_time END
    WHERE lease_token = ? AND lease_expires_at > ? AND execute_time <= ?"""

# What is stored with a time that defaults to now: the table, the mapper and that time, by kind.
_TIMED: dict[str, tuple[str, _Mapper[Any], str]] = {
    "subscription": ("event_subscriptions", _SUBSCRIPTION, "subscribe_as_of"),
    "event": ("events", _EVENT, "event_time"),
    "error": ("execution_errors", _ERROR, "error_time"),
}

# Whether a pointer has changed is told, for a tenth of what encoding it costs, by marshal's bytes (== would take True
# for 1) and, for what marshal does not know, by comparing.
_COMPARED = ("sleep_until", "start_time", "end_time", "status", "status.__class__")
_compared = operator.attrgetter(*_COMPARED)
_marshalled = operator.attrgetter(*(name for name in _POINTER.fields if name not in _COMPARED))

def _fingerprints(pointers: Sequence[Any]) -> dict[Any, Any]:
    """By id, what changes when a pointer does; fewer than there are pointers when that cannot be told."""
    try:
        compared = [*map(_compared, pointers)]
        if {type(time.tzinfo) for fields in compared for time in fields[:3] if time is not None} - {type(UTC)}:
            return {}  # == does not tell the two times apart that a clock shows when summer ends
        # Version 2: later ones write references, and so how often an object is used.
        plain = map(marshal.dumps, map(_marshalled, pointers), itertools.repeat(2))
        return dict(zip(map(operator.attrgetter("id"), pointers), zip(compared, plain, strict=True), strict=True))
    except (AttributeError, TypeError, ValueError):
        return {}

def _pointer_row(pointer: ExecutionPointer, index: int) -> tuple[Any, ...]:
    path = f"execution_pointers[{index}]"
    return tuple(_POINTER.encode(pointer, f"{path}.", argument=path).values())

def _listed(value: object, path: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise InvalidData(f"{path}: a list is needed, not {type(value).__name__}")
    return value

def _as_of(tx: _Tx, value: datetime | None, path: str = "as_of") -> int:
    return tx.now() if value is None else _time(value, path)

class PersistenceProvider(_Facet):
    """Workflow instances, events, subscriptions, commands and errors. Source: PersistenceProvider."""

    def __init__(self, engine: _Engine) -> None:
        super().__init__(engine)
        # Of a few instances that this store wrote last: the stamp it left in the row, and the fingerprints and places
        # of their pointers. Each write leaves a new stamp: one that still stands says all without a look.
        self._known: dict[str, tuple[int, dict[Any, Any], list[int]]] = {}

    def _add(self, tx: _Tx, kind: str, record: object, path: str = "") -> str:
        """Insert a record; its id."""
        table, mapper, time = _TIMED[kind]
        values = mapper.encode(record, path and f"{path}.", argument=path or kind)
        if values[time] is None:
            values[time] = tx.now()
        if not tx.run(mapper.insert(table), *values.values()):
            raise AlreadyExists(kind, values["id"])
        return str(values.get("id"))

    def _get(self, tx: _Tx, kind: str, id: AnyId) -> Any:
        table, mapper, _ = _TIMED[kind]
        row = tx.row(f"SELECT {mapper.columns} FROM {table} WHERE id = ?", key := _id(id, "id"))
        if row is None:
            raise NotFound(kind, key)
        return mapper.decode(row)

    def _change(self, tx: _Tx, kind: str, statement: str, id: AnyId, *params: Any) -> None:
        """Run a statement whose last parameter is an id; NotFound when it finds no row."""
        if not tx.run(statement, *params, key := _id(id, "id")):
            raise NotFound(kind, key)

    # --- instances ---
    @_write
    def create_new_workflow(self, tx: _Tx, instance: WorkflowInstance) -> str:
        """Store a new instance with its pointers; its id. Source: create_new_workflow.

        An empty id is made; an empty name becomes `{definition id}-{N}`, N the next in sequence whose name is free.
        Raises AlreadyExists for a taken id or name, InvalidData."""
        if _is(WorkflowInstance, instance, "instance").id == "":
            instance = dataclasses.replace(instance, id=new_id())
        values, stamp = _INSTANCE.encode(instance), _random_bits(62)
        if values["create_time"] is None:
            values["create_time"] = tx.now()
        automatic, definition = not values["name"], values["workflow_definition_id"]
        while automatic and (not values["name"] or tx.row(_INSTANCE_BY_NAME, values["name"])):
            values["name"] = _key(f"{definition}-{tx.rows(_COUNTER_NEXT, definition)[0][0]}", "the automatic name")
        if not tx.run(_INSTANCE.insert("workflows", "stamp"), *values.values(), stamp):
            id_is_taken = tx.row("SELECT id FROM workflows WHERE id = ?", values["id"])
            raise AlreadyExists("workflow", values["id" if id_is_taken else "name"])
        self._write_pointers(tx, values["id"], instance.execution_pointers, None, stamp)
        return str(values["id"])

    @_write
    def persist_workflow(self, tx: _Tx, instance: WorkflowInstance) -> None:
        """Store an instance as it is now, writing only the pointers that changed. Source: persist_workflow.

        `create_time` never changes, an empty name keeps the stored one. Raises NotFound, AlreadyExists (name)."""
        self._persist(tx, instance)

    @_write
    def persist_workflow_with_subscriptions(
        self, tx: _Tx, instance: WorkflowInstance, subscriptions: Sequence[EventSubscription]
    ) -> None:
        """`persist_workflow`, and new subscriptions: all or none. Raises AlreadyExists. Source: WorkflowRepository."""
        self._persist(tx, instance)
        for index, subscription in enumerate(_listed(subscriptions, "subscriptions")):
            self._add(tx, "subscription", subscription, f"subscriptions[{index}]")

    def _persist(self, tx: _Tx, instance: WorkflowInstance) -> None:
        values, stamp = _INSTANCE.encode(instance, argument="instance"), _random_bits(62)
        stored = tx.row("SELECT name, stamp FROM workflows WHERE id = ?", id := values["id"])
        if stored is None:
            raise NotFound("workflow", id)
        values["name"] = values["name"] or stored[0]
        if values["name"] != stored[0] and tx.row(_INSTANCE_BY_NAME, values["name"]):
            raise AlreadyExists("workflow", values["name"])
        tx.run(_INSTANCE_UPDATE, *(values[name] for name in _INSTANCE_CHANGED), stamp, id)
        self._write_pointers(tx, id, instance.execution_pointers, stored[1], stamp)

    def _write_pointers(self, tx: _Tx, id: str, given: object, stored_stamp: int | None, stamp: int) -> None:
        """Write the pointers that differ from the stored ones, which are read unless the stamp is our own."""
        pointers = _listed(given, "execution_pointers")
        prints, (known_stamp, known, places) = _fingerprints(pointers), self._known.pop(id, (-1, {}, []))
        if known_stamp == stored_stamp and len(prints) == len(pointers) and [*known] == [*prints][: len(known)]:
            end = max(places, default=-1) + 1
            places = [*places, *range(end, end + len(prints) - len(known))]
            pairs = enumerate(itertools.zip_longest(prints.values(), known.values()))
            rows = [(places[at], *_pointer_row(pointers[at], at)) for at, (now, before) in pairs if now != before]
        else:
            rows, places = self._compare(tx, id, pointers)
        tx.run_many(_POINTER_WRITE, [(id, *row) for row in rows])
        if len(self._known) >= 16:  # a few, since they may be large
            self._known.clear()
        if len(prints) == len(pointers):
            self._known[id] = stamp, prints, places

    def _compare(self, tx: _Tx, id: str, pointers: Sequence[Any]) -> tuple[list[tuple[Any, ...]], list[int]]:
        """The rows that differ, and all places, kept while they only ever increase; pointers that are gone go."""
        stored = {row[2]: row[1:] for row in tx.rows(_POINTERS.format("?"), id)}
        places: dict[str, int] = {}
        rows, last = [], -1
        for index, pointer in enumerate(pointers):
            row = _pointer_row(pointer, index)
            if row[0] in places:
                raise InvalidData(f"execution_pointers[{index}].id: {row[0]!r} is another pointer's too")
            before = stored.pop(row[0], (-1,))
            places[row[0]] = last = max(before[0], last + 1)
            if before != (last, *row):
                rows.append((last, *row))
        tx.run_many("DELETE FROM execution_pointers WHERE workflow_id = ? AND id = ?", [(id, gone) for gone in stored])
        return rows, [*places.values()]

    @_read
    def get_runnable_instances(self, tx: _Tx, as_at: datetime | None = None) -> list[str]:
        """The ids of those Runnable and due by `as_at` (None: now), soonest first. Source: get_runnable_instances."""
        sql = "SELECT id FROM workflows WHERE status = 'Runnable' AND next_execution <= ? ORDER BY next_execution, id"
        return [id for (id,) in tx.rows(sql, _as_of(tx, as_at, "as_at") // 1000)]

    @_snapshot
    def get_workflow_instance(self, tx: _Tx, id: AnyId) -> WorkflowInstance:
        """One instance, its pointers in their order. Raises NotFound. Source: get_workflow_instance."""
        return self._instances(tx, [_id(id, "id")], required=True)[0]

    @_snapshot
    def get_workflow_instance_by_name(self, tx: _Tx, name: str) -> WorkflowInstance:
        """One instance by its name. Raises NotFound. Source: get_workflow_instance_by_name."""
        row = tx.row(_INSTANCE_BY_NAME, _key(name, "name"))
        return self._instances(tx, [row[0] if row else name], required=True)[0]

    @_snapshot
    def get_workflow_instances(self, tx: _Tx, ids: Sequence[AnyId]) -> list[WorkflowInstance]:
        """Instances in the order asked, unknown ids skipped: two queries per 10,000. Source: get_workflow_instances."""
        asked = [_id(id, f"ids[{index}]") for index, id in enumerate(_listed(ids, "ids"))]
        return [one for at in range(0, len(asked), 10_000) for one in self._instances(tx, asked[at : at + 10_000])]

    def _instances(self, tx: _Tx, ids: list[str], *, required: bool = False) -> list[WorkflowInstance]:
        marks = ", ".join("?" * len(ids))
        rows = {row[0]: row for row in tx.rows(_INSTANCES.format(marks), *ids)}
        pointers: dict[str, list[tuple[Any, ...]]] = {id: [] for id in rows}
        for row in tx.rows(_POINTERS.format(marks), *ids):
            pointers[row[0]].append(row[2:])
        if required and not rows:
            raise NotFound("workflow", ids[0])
        found = [_INSTANCE.decode(rows[id]) for id in ids if id in rows]
        for instance in found:
            instance.execution_pointers = _POINTER.decode_all(pointers[instance.id])
        return found

    @_write
    def next_definition_sequence(self, tx: _Tx, definition_id: str) -> int:
        """1, 2, 3, ... for each definition, shared with the automatic names. Source: next_definition_sequence."""
        return int(tx.rows(_COUNTER_NEXT, _key(definition_id, "definition_id"))[0][0])

    @_write
    def delete_workflow(self, tx: _Tx, id: AnyId) -> None:
        """Delete an instance with its pointers, subscriptions and errors. Raises NotFound. Source: delete_workflow."""
        self._delete(tx, _id(id, "id"))

    def _delete(self, tx: _Tx, id: str) -> int:
        """Delete an instance with all that is its own; how many rows that took."""
        of_it = ("execution_pointers", "event_subscriptions", "execution_errors")
        rows = sum(tx.run(f"DELETE FROM {table} WHERE workflow_id = ?", id) for table in of_it)
        self._change(tx, "workflow", "DELETE FROM workflows WHERE id = ?", id)
        return rows + 1

    @_steps
    def purge_workflows(self, status: WorkflowStatus | str, older_than: datetime) -> Generator[Any, Any, int]:
        """Delete those of a status completed (else created) before a time; how many. Source: purge_workflows."""
        word, before, total = _enum(WorkflowStatus, status, "status").value, _time(older_than, "older_than"), 0
        while gone := (yield self._purge(word, before)):
            total += gone
        return total

    @_write
    def _purge(self, tx: _Tx, status: str, before: int) -> int:
        gone = rows = 0
        for (id,) in tx.rows(_INSTANCES_OLD, status, before):
            gone, rows = gone + 1, rows + self._delete(tx, id)
            if rows > 1000:  # some have many pointers
                break
        return gone

    # --- subscriptions and events ---
    @_write
    def create_event_subscription(self, tx: _Tx, subscription: EventSubscription) -> str:
        """Store a subscription; its id. Raises AlreadyExists. Source: create_event_subscription."""
        return self._add(tx, "subscription", subscription)

    @_read
    def get_subscription(self, tx: _Tx, id: AnyId) -> EventSubscription:
        """A subscription, terminated ones too. Raises NotFound. Source: get_subscription."""
        return _is(EventSubscription, self._get(tx, "subscription", id), "subscription")

    @_write
    def terminate_subscription(self, tx: _Tx, id: AnyId) -> None:
        """End a subscription; again has no effect. Raises NotFound. Source: terminate_subscription."""
        sql = "UPDATE event_subscriptions SET terminated_at = COALESCE(terminated_at, ?) WHERE id = ?"
        self._change(tx, "subscription", sql, id, tx.now())

    @_read
    def get_subscriptions(
        self, tx: _Tx, event_name: str, event_key: str, as_of: datetime | None = None
    ) -> list[EventSubscription]:
        """Those to an event, begun by a time (None: now), not terminated, oldest first. Source: get_subscriptions."""
        event = _key(event_name, "event_name"), _key(event_key, "event_key"), _as_of(tx, as_of)
        return _SUBSCRIPTION.decode_all(tx.rows(_SUBSCRIPTIONS.format(""), *event, _INT_MAX))

    @_read
    def get_first_open_subscription(
        self, tx: _Tx, event_name: str, event_key: str, as_of: datetime | None = None
    ) -> EventSubscription | None:
        """The oldest of them with no token, or an expired one, or None. Source: get_first_open_subscription."""
        event = _key(event_name, "event_name"), _key(event_key, "event_key"), _as_of(tx, as_of)
        row = tx.row(_SUBSCRIPTIONS.format(f"AND {_UNHELD}"), *event, tx.now(), 1)
        return None if row is None else _SUBSCRIPTION.decode(row)

    @_write_row
    def set_subscription_token(self, tx: _Tx, id: AnyId, token: str, worker_id: AnyId, expiry: datetime) -> bool:
        """Take a subscription until `expiry`: True for one of any number of callers. Source: set_subscription_token.

        False while a token that has not expired is set, even one's own. Raises NotFound if missing or terminated."""
        key, until = _id(id, "id"), _time(expiry, "expiry")
        if tx.run(_HOLD_SUBSCRIPTION, _text(token, "token"), _id(worker_id, "worker_id"), until, key, tx.now()):
            return True
        if tx.row("SELECT id FROM event_subscriptions WHERE id = ? AND terminated_at IS NULL", key) is None:
            raise NotFound("subscription", key)
        return False

    @_write_row
    def clear_subscription_token(self, tx: _Tx, id: AnyId, token: str) -> None:
        """Give a subscription back. Raises NotFound unless this is its token. Source: clear_subscription_token."""
        self._change(tx, "subscription", _LET_GO, id, _text(token, "token"))

    @_write
    def create_event(self, tx: _Tx, event: Event) -> str:
        """Store an event; its id. Raises AlreadyExists. Source: create_event."""
        return self._add(tx, "event", event)

    @_read
    def get_event(self, tx: _Tx, id: AnyId) -> Event:
        """An event. Raises NotFound. Source: get_event."""
        return _is(Event, self._get(tx, "event", id), "event")

    @_read
    def get_runnable_events(self, tx: _Tx, as_at: datetime | None = None) -> list[str]:
        """The ids of events up to `as_at` (None: now) not processed yet, oldest first. Source: get_runnable_events."""
        sql = "SELECT id FROM events WHERE is_processed = 0 AND event_time <= ? ORDER BY event_time, id"
        return [id for (id,) in tx.rows(sql, _as_of(tx, as_at, "as_at"))]

    @_read
    def get_events(self, tx: _Tx, event_name: str, event_key: str, as_of: datetime | None = None) -> list[str]:
        """The ids of events of a name and key up to `as_of` (None: now), oldest first. Source: get_events."""
        event = _key(event_name, "event_name"), _key(event_key, "event_key"), _as_of(tx, as_of)
        sql = "SELECT id FROM events WHERE event_name = ? AND event_key = ? AND event_time <= ? ORDER BY event_time, id"
        return [id for (id,) in tx.rows(sql, *event)]

    @_write
    def mark_event_processed(self, tx: _Tx, id: AnyId) -> None:
        """The event is done with. Raises NotFound. Source: mark_event_processed."""
        self._change(tx, "event", "UPDATE events SET is_processed = 1 WHERE id = ?", id)

    @_write
    def mark_event_unprocessed(self, tx: _Tx, id: AnyId) -> None:
        """The event is to be processed again. Raises NotFound. Source: mark_event_unprocessed."""
        self._change(tx, "event", "UPDATE events SET is_processed = 0 WHERE id = ?", id)

    # --- scheduled commands and errors ---
    def supports_scheduled_commands(self) -> bool:
        """True. Source: supports_scheduled_commands."""
        return True

    @_write
    def schedule_command(self, tx: _Tx, command: ScheduledCommand) -> None:
        """Have a command handled: one per name and data, at the earliest time asked for. Source: schedule_command."""
        values, now = _COMMAND.encode(command, argument="command"), tx.now()
        tx.run(_SCHEDULE, *values.values(), now, now, now)

    @_steps
    def process_commands(
        self, as_of: datetime | None, handler: Callable[[ScheduledCommand], Any], *, lease_seconds: float | None = None
    ) -> Generator[Any, Any, int]:
        """Handle each command due by `as_of` (None: now), soonest first, at most once; how many handlers returned.

        Each is leased to one caller just before `handler(command)`, outside any transaction, and removed when that
        returns. If it raises, the command stays for a later call, the rest go on, and an ExceptionGroup follows; what
        is no Exception propagates at once. After a crash, or a handler that outlived its lease, the command is handed
        out again. Raises StorageError inside one's own transaction. Source: process_commands."""
        self._engine.forbid_inside("process_commands()")
        due = _time(self._engine.now() if as_of is None else as_of, "as_of") // 1000
        lease, token, handled = self._lease(lease_seconds), new_id(), 0
        found: Any = (-_INT_MAX - 1, "", "")
        seen: set[tuple[str, str]] = set()  # what is scheduled again while it is handled waits for a later call
        errors: list[Exception] = []
        try:
            while (found := (yield self._lease_next(due, found, seen, token, lease))) is not None:
                execute_time, *command = found
                seen.add(found[1:])
                try:
                    yield handler(_COMMAND.decode((*command, execute_time)))
                except Exception as error:
                    errors.append(error)
                    yield self._give_back(token, due, *command)
                else:
                    handled += yield self._handled(token, *command)
        except BaseException as struck:
            if not isinstance(struck, Exception):
                with contextlib.suppress(StorageError):  # what struck says more
                    given_back = self._give_back(token, due)
                    if not isinstance(struck, GeneratorExit):
                        yield given_back
            raise
        if errors:
            raise ExceptionGroup("handlers of scheduled commands raised", errors)
        return handled

    @_write
    def _lease_next(
        self, tx: _Tx, due: int, place: tuple[int, str, str], seen: set[tuple[str, str]], token: str, lease: float
    ) -> tuple[int, str, str] | None:
        """Lease the first due command behind `place` that is free; its time, name and data."""
        now, found = tx.now(), place
        while (row := tx.row(_DUE, due, now, *found)) is not None:
            found = row[0], row[1], row[2]
            if found[1:] not in seen:
                tx.run(_LEASE, token, _after(now, lease, "lease_seconds"), *found[1:])
                return found
        return None

    @_write
    def _handled(self, tx: _Tx, token: str, name: str, data: str) -> int:
        """Remove a command, or keep it for the time it was scheduled again for; 0 when its lease was lost."""
        held = token, tx.now(), name, data
        return tx.run(_AGAIN, *held) or tx.run(f"DELETE FROM scheduled_commands {_HELD}", *held)

    @_write
    def _give_back(self, tx: _Tx, token: str, due: int, *command: str) -> None:
        """Free a command for the next caller; where name and data are not known, whatever the token holds."""
        sql = _GIVE_BACK + (" AND command_name = ? AND data = ?" if command else "")
        tx.run(sql, token, tx.now(), due, *command)

    @_write
    def persist_errors(self, tx: _Tx, errors: Sequence[ExecutionError]) -> None:
        """Keep errors of steps, all or none. Source: persist_errors."""
        for index, error in enumerate(_listed(errors, "errors")):
            self._add(tx, "error", error, f"errors[{index}]")

    @_read
    def list_errors(self, tx: _Tx, workflow_id: AnyId, limit: int = 100, offset: int = 0) -> list[ExecutionError]:
        """The errors of a workflow, newest first."""
        sql = f"SELECT {_ERROR.columns} FROM execution_errors WHERE workflow_id = ? ORDER BY id DESC LIMIT ? OFFSET ?"
        return _ERROR.decode_all(tx.rows(sql, _id(workflow_id, "workflow_id"), _limit(limit), _count(offset, "offset")))

    @_read
    def ensure_store_exists(self, tx: _Tx) -> None:
        """No effect: opening the store made its tables. Source: ensure_store_exists."""
        tx.row("SELECT value FROM flowstore_meta WHERE key = 'schema'")


# ============================================================================================================
# Store: what open() returns
# ============================================================================================================

class Store(_Facet):
    """A durable memory for workflows in one database: four facets, and what concerns all of it.

    Any number of threads may share one, any number of processes may open the same file, and both sides of a fork may
    go on using it. Close it, or use it as a context manager. Source: SqliteBackend."""

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

    @property
    def target(self) -> str:
        """What was opened."""
        return self._engine.target

    @property
    def read_only(self) -> bool:
        """True when nothing can be changed through this store."""
        return self._engine.options.read_only

    def __repr__(self) -> str:
        return f"<flowstore.Store {self.target!r}{' (closed)' if self._engine.closed else ''}>"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def transaction(self) -> contextlib.AbstractContextManager[Transaction]:
        """`with store.transaction() as tx:` all that this thread or task does in the block, or nothing of it.

        Facet calls join it, each as a savepoint, as is a nested one; `tx.execute` runs the user's own SQL. What leaves
        the block as an exception undoes it. Raises StoreBusy, and StorageError when the database ended it."""
        return self._engine.transaction()

    def now(self) -> datetime:
        """The store's time, in UTC."""
        return self._engine.now()

    def close(self) -> None:
        """Close the store: calls under way finish, waiters and later calls get StoreClosed; again has no effect.

        Raises StorageError inside one's own transaction. Source: StorageBackend.shutdown."""
        self._engine.forbid_inside("close()")
        self._engine.close()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the store to a new file while it is in use: consistent, and complete or not there at all.

        Raises StorageError for a path that exists, and inside one's own transaction."""
        self._engine.forbid_inside("backup()")
        self._engine.backup(_path(path, "path"))

    def check(self) -> list[str]:
        """Read the whole file and list what is wrong with it; empty when it is sound.

        Raises StorageError inside one's own transaction."""
        self._engine.forbid_inside("check()")
        return self._engine.aside(_problems)

    def compact(self) -> None:
        """Give unused space back to the file system and empty the write-ahead log; writers go on between its steps.

        Raises StoreBusy, and StorageError inside one's own transaction."""
        self._engine.forbid_inside("compact()")
        self._engine.compact()

    @_snapshot
    def stats(self, tx: _Tx) -> dict[str, Any]:
        """How much is in the store, as JSON values: rows, runs by status, queues, bytes. Source: health_check."""
        queues: dict[str, dict[str, int]] = {}
        for queue, status, count in tx.rows(
            "SELECT queue_type, status, COUNT(*) FROM flowstore_work_items GROUP BY queue_type, status"
        ):
            queues.setdefault(queue, {})[status] = count
        by_status = "SELECT status, COUNT(*) FROM {} GROUP BY status".format
        return {
            "tables": {name: tx.rows(f"SELECT COUNT(*) FROM {name}")[0][0] for name in sorted(_TABLE_NAMES)},
            "flows": dict(tx.rows(by_status("flows"))),
            "executions": dict(tx.rows(by_status("flowstore_runs"))),
            "workflows": dict(tx.rows(by_status("workflows"))),
            "queues": queues,
            **self._engine.sizes(tx),
        }

def _problems(tx: _Tx) -> list[str]:
    """What is wrong with a database: SQLite's own findings, then ours."""
    try:
        found = [row[0] for row in tx.rows("PRAGMA integrity_check") if row[0] != "ok"]
        found += [f"{table}: row {row} refers to a row of {parent} that is not there"
                  for table, row, parent, _ in tx.rows("PRAGMA foreign_key_check")]
        found += [f"the log of execution {execution!r} has a gap" for (execution,) in tx.rows(
            "SELECT execution_id FROM flowstore_log WHERE execution_id <> '' GROUP BY execution_id "
            "HAVING COUNT(*) <> MAX(sequence) OR MIN(sequence) <> 1 ORDER BY execution_id")]
        found += [f"the log has events of execution {execution!r}, which is not known" for (execution,) in tx.rows(
            "SELECT DISTINCT execution_id FROM flowstore_log l WHERE execution_id <> '' AND NOT EXISTS "
            "(SELECT 1 FROM flowstore_executions e WHERE e.execution_id = l.execution_id) ORDER BY execution_id")]
        return found
    except (StoreBusy, StoreClosed):
        raise
    except StorageError as error:
        return [str(error)]

def _path(path: object, argument: str) -> str:
    """An absolute path: what is opened again later must not depend on the working directory."""
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise InvalidData(f"{argument}: a path is needed, not {type(path).__name__}")
    if not _text(text, argument):
        raise InvalidData(f"{argument}: the path is empty")
    return os.path.abspath(text)

_SERVERS: dict[str, Callable[[str, _Options], _Engine]] = {}  # by the scheme of its URLs, the engine of a server

def _parse_target(target: object) -> tuple[str, str | None]:
    """What to call a target, and the absolute path of its file (None: in memory; "": on a server)."""
    if not isinstance(target, str):
        return str(target), _path(target, "target")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?", target)
    name = target
    if scheme and scheme[1].lower() == "sqlite":
        import urllib.parse

        name = target[7:].removeprefix("//")
        if "?" in name:
            raise InvalidData("target: a ?query is not understood here: pass options to open() by name")
        name = urllib.parse.unquote(name, errors="surrogateescape")
    elif scheme and scheme[1].lower() in _SERVERS:
        return target, ""
    elif scheme and scheme[2]:
        raise StorageError(f"target: the scheme {scheme[1]!r} is not known: give a path, sqlite:///path or :memory:")
    return target, None if name == ":memory:" else _path(name, "target")

def open(
    target: str | os.PathLike[str], *, synchronous: str = "FULL", busy_timeout: float = 30.0,
    lease_seconds: float = 30.0, backoff: Callable[[int], float] | None = None,
    clock: Callable[[], datetime] | None = None, read_only: bool = False,
) -> Store:
    """Open a store, creating it with all its tables where there is none.

    `target`: a path, `"sqlite:///absolute"`, `"sqlite://relative"` or `":memory:"`. `synchronous`: FULL (what is
    acknowledged survives power loss), NORMAL (a crash of the process) or OFF. `busy_timeout`: seconds to wait for other
    processes and transactions. `lease_seconds`: how long a claim lasts. `backoff`: seconds before attempt n of an item
    (default `min(2**n, 64)`). `clock`: where every "now" comes from. `read_only`: nothing in the database is changed.

    Raises InvalidData for an option out of range, StorageError and SchemaError for what cannot be opened, which is left
    as it was. Source: SqliteBackend::open, SqlitePersistenceProvider::new, SqliteFlowStore::open."""
    mode = _text(synchronous, "synchronous").upper()
    if mode not in ("FULL", "NORMAL", "OFF"):
        raise InvalidData(f"synchronous: FULL, NORMAL or OFF is needed, not {synchronous!r}")
    for function, argument in ((backoff, "backoff"), (clock, "clock")):
        if function is not None and not callable(function):
            raise InvalidData(f"{argument}: a function is needed, not {type(function).__name__}")
    if not isinstance(read_only, bool):
        raise InvalidData(f"read_only: True or False is needed, not {type(read_only).__name__}")
    options = _Options(
        synchronous=mode,
        busy_timeout=min(_seconds(busy_timeout, "busy_timeout"), threading.TIMEOUT_MAX / 2),
        lease_seconds=_seconds(lease_seconds, "lease_seconds"),
        backoff=backoff,
        clock=clock,
        read_only=read_only,
    )
    _after(0, options.lease_seconds, "lease_seconds")
    if sqlite3.sqlite_version_info < (3, 35):
        raise StorageError(f"SQLite 3.35 or newer is needed, this Python has {sqlite3.sqlite_version}")
    name, path = _parse_target(target)
    if path == "":
        return Store(_SERVERS[name.split(":")[0].lower()](name, options))
    if path is not None:
        if os.path.isdir(path):
            raise StorageError(f"{path}: this is a folder: name a file in it")
        if not os.path.isdir(os.path.dirname(path)):
            raise StorageError(f"{path}: the folder {os.path.dirname(path)} does not exist: make it first")
        if read_only and not os.path.exists(path):
            raise StorageError(f"{path}: there is no such file: a store opened read-only is not created")
    return Store(_Engine(name, path, options))

__all__ = [
    name
    for name, value in globals().items()
    if not name.startswith("_") and name != "open" and inspect.isroutine(value) | inspect.isclass(value)
    and value.__module__ == __name__
]
__all__ += ["DEFAULT_TENANT"]


# ============================================================================================================
# Command line: selftest, demo, bench, check, backup, compact
# ============================================================================================================

# What only commands need is imported in them: who imports this module for its store does not pay for it.
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 for good, 1 for a problem found, 2 for wrong usage."""
    import argparse
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise SystemExit(_complain(f"{message} (see {self.prog} --help)", 2))
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    called = f"python -m {__spec__.name}" if __spec__ else f"python {sys.argv[0]}"
    parser = Parser(prog=called if __name__ == "__main__" else "flowstore", description="Durable memory for workflows.")
    parser.add_argument("--version", action="version", version=f"flowstore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (function, about, its_arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=f"{name}: {about}.")
        command.set_defaults(function=function, program=parser.prog)
        for argument, options in its_arguments.items():
            command.add_argument(argument, **options)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in _HELPERS:
            return _HELPERS[arguments[0]](*arguments[1:])
        parsed = parser.parse_args(arguments)
        status = int(parsed.function(parsed))
        print(end="", flush=True)  # here, where a closed pipe can still be met quietly
        return status
    except SystemExit as end:  # wrong usage, or --help; what there is to say was printed
        return int(end.code or 0)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader has gone, as `| head` does; leave nothing for the exit to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (FlowStoreError, OSError, sqlite3.Error) as error:
        return _complain(error, 1)

def _complain(problem: object, status: int) -> int:
    """Say what is wrong in one line on standard error; returns the status."""
    print("flowstore:", " ".join(str(problem).split()) or type(problem).__name__, file=sys.stderr)
    return status

def _spawn(name: str, *arguments: str) -> Any:
    """A process of our own, which Ctrl-C in the terminal does not reach: this same file, wherever it lies."""
    from subprocess import PIPE, Popen
    # -P, for the folder of a vendored copy may hold modules that hide the standard library's.
    command = [sys.executable, "-P", os.path.abspath(__file__), name, *arguments]
    return Popen(command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)

def _in_threads(count: int, function: Callable[[int], T]) -> list[T]:
    """What the function returns in each of so many threads."""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))

def _bar(stream: TextIO, done: int = 0, total: int = 0, text: str = "") -> bool:
    """On a terminal, draw a progress bar over the last one, or with no total take it away; False elsewhere."""
    line = f"[{'#' * (30 * done // total):.<30}] {done}/{total} {text}" if total else ""
    print(f"\r{line:79.79}\r" if stream.isatty() else "", end="", file=stream, flush=True)
    return stream.isatty()

# --- selftest: does this copy work on this machine? ---
def _expect(found: object, wanted: object) -> None:
    """Fail unless they are equal; an assert would be gone under `python -O`."""
    if found != wanted:
        raise AssertionError(f"found {found!r:.300}, not {wanted!r:.300}")

def _expect_error(error: type[Exception], call: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Fail unless the call raises the error, its message in one line."""
    try:
        call(*arguments, **options)
    except error as caught:
        return _expect(str(caught).count("\n"), 0)
    raise AssertionError(f"no {error.__name__} was raised")

def _selftest_writer(target: str, run: str) -> int:
    """Append for ever, and print each sequence once it is stored: the process that the selftest kills."""
    with open(target) as store:
        while True:
            print(store.events.append(run, "default", {"type": "custom", "text": "child"}), flush=True)

def _selftest(args: Any) -> int:
    """Try every promise, a line each, and say how many passed and failed."""
    import tempfile
    if _parse_target(args.target or "a file")[1] is None:
        return _complain("--target: a file is needed, other processes cannot see a store in memory", 2)
    with (tempfile.TemporaryDirectory(prefix="flowstore-", ignore_cleanup_errors=True) as folder,
          open(args.target or os.path.join(folder, "selftest.db")) as store):
        return _selftest_promises(store, folder, args.target or store.target)

def _selftest_promises(store: Store, folder: str, target: str) -> int:
    """Each promise and a block that fails unless it holds; returns the exit status."""
    state: Any = store.state
    kept, notes = list[bool](), list[str]()
    def append(run: str, text: str, to: Store = store, **options: Any) -> int:
        return to.events.append(run, "default", {"type": "custom", "text": text}, **options)
    def expect_log(run: str, *texts: str) -> None:
        """The log has to hold, without a gap and in any order, events of these texts behind its first."""
        stored = store.events.load_events(run)
        _expect([event.sequence for event in stored], list(range(1, len(texts) + 2)))
        _expect(sorted(event.event["text"] for event in stored), sorted(["begin", *texts]))
    @contextlib.contextmanager
    def promise(text: str) -> Iterator[str]:
        """Say whether the block kept the promise; it has an execution of its own, its log at 1, to try it on."""
        try:
            notes.clear()
            append(run := new_id(), "begin")
            state.create_execution(WorkflowExecution(execution_id=run, workflow_id="selftest"))
            state.update_execution_status(run, "completed")  # so that a prune of the user's store takes it away
            yield run
            kept.append(True)
        except Exception as error:  # the other promises are still worth a try
            kept.append(False)
            notes[:] = [type(error).__name__, *str(error).split()]
        print("ok  " if kept[-1] else "FAIL", text + (f" ({' '.join(notes)})" if notes else ""), flush=True)
    with promise("sqlite: its version and threading mode will do"):
        mode = "serialized" if sqlite3.threadsafety == 3 else "multi-thread"
        notes.append(f"{sqlite3.sqlite_version}, {mode}, Python {sys.version.split()[0]}")
        _expect((sqlite3.sqlite_version_info >= (3, 35), sqlite3.threadsafety > 0), (True, True))
    with promise("file: WAL works on this file system, and a commit waits until the disk has it") as run:
        if _parse_target(target)[1]:
            with store.transaction() as tx:
                modes = tx.execute("SELECT journal_mode, synchronous FROM pragma_journal_mode, pragma_synchronous")
            _expect(tuple(modes[0]), ("wal", 2))
        start = time.perf_counter()
        expect_log(run, *(f"event {append(run, f'event {number}')}" for number in range(2, 12)))
        notes.append(f"synchronous FULL, {(time.perf_counter() - start) * 100:.2f} ms each")
    with promise("log: 8 threads append to one execution without gap or loss") as run:
        told = _in_threads(8, lambda _: [append(run, "\u00e9") for _ in range(10)])
        _expect(sorted(sequence for some in told for sequence in some), list(range(2, 82)))
        expect_log(run, *["\u00e9"] * 80)
    with promise("log: expected_sequence refuses what comes too late, event_id what comes twice") as run:
        _expect([append(run, "once", event_id="id-" + run, expected_sequence=1) for _ in range(3)], [2, 2, 2])
        _expect_error(SequenceConflict, append, run, "late", expected_sequence=1)
        expect_log(run, "once")
    with promise("transaction: all or nothing, over log, queue and your own tables; a nested one alone") as run:
        table = f"selftest_{run.replace('-', '_')}"
        with store.transaction() as tx:
            append(run, "outer")
            with contextlib.suppress(KeyError), store.transaction():
                tx.execute(f"CREATE TABLE {table} (total INTEGER)")
                state.enqueue_work_item(WorkItem(execution_id=run, queue_type=run))
                raise KeyError
            _expect_error(StorageError, tx.execute, f"SELECT total FROM {table}")
        with contextlib.suppress(KeyError), store.transaction():
            append(run, "undone")
            raise KeyError
        _expect(state.list_work_items(queue_type=run), [])
        expect_log(run, "outer")
    with promise("queue: 8 threads claim every item exactly once") as run:
        wanted = [state.enqueue_work_item(WorkItem(execution_id=run, queue_type=run)) for _ in range(40)]
        claims = _in_threads(8, lambda _: [state.claim_work_item("worker", [run]) for _ in range(5)])
        _expect(sorted(state.complete_work_item(item).id for some in claims for item in some), sorted(wanted))
    now, path, copy = [datetime.now(UTC)], os.path.join(folder, "other.db"), os.path.join(folder, "copy.db")
    later = functools.partial(open, backoff=lambda attempt: 0, clock=lambda: now[0])
    with promise("lease: an expired one is taken over, and its stale fence is refused") as run, later(target) as other:
        state.enqueue_work_item(WorkItem(execution_id=run, queue_type=run))
        first = state.claim_work_item("worker-1", [run])
        now[0] += timedelta(days=1)
        second: Any = other.state.claim_work_item("worker-2", [run], wait=5)
        _expect(second.lease_fence > first.lease_fence, True)
        _expect_error(LeaseLost, state.complete_work_item, first)
        _expect(other.state.complete_work_item(second).status, "completed")
    with promise("lease: each expiry counts as an attempt; a poison item ends as a dead letter"), later(path) as other:
        append("run", "begin", other)
        other.state.enqueue_work_item(WorkItem(id="poison", execution_id="run", queue_type="queue"))
        for attempt in range(3):
            _expect((item := other.state.claim_work_item("worker", ["queue"])) and item.attempt, attempt)
            now[0] += timedelta(days=1)
            other.state.reclaim_expired_leases()
        _expect([letter.id for letter in other.state.list_dead_letters()], ["poison"])
    with promise("snapshot: replay goes on from the latest one") as run:
        _expect([append(run, text) for text in "bc"], [2, 3])
        state.write_snapshot(Snapshot(execution_id=run, at_sequence=2, state="AB"))
        _expect(state.replay(run, lambda state, stored: state + stored.event["text"]), ("ABc", 3))
    with promise("flow: a stale revision is refused, and its event with it"), later(path) as other:
        flow = other.flows.insert(Flow())
        other.flows.update_and_append(flow, "begun", {})
        _expect_error(RevisionMismatch, other.flows.update_and_append, flow, "late", {})
        _expect([entry.kind for entry in other.flows.list_events(flow.id)], ["begun"])
    with promise("tenant: a view shows nothing of another's, and a token tells its tenant"), later(path) as other:
        other.state.create_tenant(Tenant(id="acme"))
        acme: Any = other.state.for_tenant("acme")
        _expect((acme.get_events("run"), acme.list_dead_letters()), ([], []))
        _expect(acme.validate_token(acme.create_token("ci", "worker")[0]).tenant_id, "acme")
    with promise("workflow: one of 8 hosts gets a subscription; a command is handled once"), later(path) as other:
        host = other.workflows
        key = host.create_event_subscription(EventSubscription(
            workflow_id="run", step_id=0, execution_pointer_id="pointer", event_name="event", event_key="key"))
        until = now[0] + timedelta(days=1)
        _expect(sum(_in_threads(8, lambda number: host.set_subscription_token(key, str(number), "host", until))), 1)
        host.schedule_command(ScheduledCommand(command_name=CommandName.PROCESS_EVENT, data=key, execute_time=0))
        _expect([host.process_commands(None, lambda command: None) for _ in range(2)], [1, 0])
    with promise("crash: what a process was told is stored survives its kill") as run:
        with _spawn("selftest-writer", target, run) as child:
            told_of = [int(child.stdout.readline()) for _ in range(20)]
            child.kill()
            told_of += [int(line) for line in child.stdout if line.endswith("\n")]
        stored = store.events.count_events(run)
        _expect((told_of, stored >= told_of[-1]), (list(range(2, len(told_of) + 2)), True))
        notes.append(f"killed after {len(told_of)} appends")
        expect_log(run, *["child"] * (stored - 1))
    if hasattr(os, "fork"):
        with promise("fork: both sides go on, and nothing is lost") as run, open(target) as other:
            append(run, "before", other)
            if (pid := os.fork()) == 0:
                try:
                    os._exit(append(run, "child", other) < 3)
                finally:
                    os._exit(1)  # past every `finally` of the parent's
            append(run, "parent", other)
            _expect(os.waitpid(pid, 0)[1], 0)
            expect_log(run, "before", "child", "parent")
    with promise("file: opened again, or as a backup made while in use, it is sound and holds the same"):
        with open(path) as other:
            other.backup(copy)
            _expect_error(StorageError, other.backup, copy)
            written = other.events.load_events("run")
        for again in (path, copy):
            with open(again, read_only=True) as other:
                _expect((other.check(), other.events.load_events("run")), ([], written))
    with promise("errors: bad input is refused in one line, and nothing is written") as run:
        for bad in ({"type": "custom", "x": [float("nan")]}, {"type": "custom", "x": object()}, {"type": ""}):
            _expect_error(InvalidData, store.events.append, run, "default", bad)
        _expect_error(StorageError, open, folder)
        expect_log(run)
    print(f"{sum(kept)} passed, {len(kept) - sum(kept)} failed")
    return 0 if all(kept) else 1

# --- demo: a durable pipeline over real files, one of whose workers is killed ---
def _demo(args: Any) -> int:
    """Enqueue the files, have them done, and prove from the store that each was done exactly once."""
    import itertools
    if args.limit < 0:
        return _complain(f"--limit: 0 or more is needed, not {args.limit}", 2)
    if not os.path.isdir(args.folder):
        return _complain(f"{args.folder}: there is no such folder", 2)
    if (path := _parse_target(args.store)[1]) is None:
        return _complain("--store: a file is needed, other processes cannot see a store in memory", 2)
    folder, known = os.path.realpath(args.folder), 0
    names = ["", *itertools.islice(_demo_files(folder, path), args.limit)]
    # The same ids for the same files in every run; that of the folder itself names the queue.
    queue, *keys = (hashlib.sha256(os.fsencode(os.path.join(folder, name))).hexdigest()[:32] for name in names)
    if not keys:
        return _complain(f"no files in {folder}, so there is nothing to do: name another FOLDER", 0)
    with open(args.store) as store:
        with store.transaction():
            for key, name in zip(keys, names[1:], strict=True):
                run = WorkflowExecution(execution_id=key, workflow_id="flowstore-demo", initial_input=name)
                item = WorkItem(id=key, execution_id=key, queue_type=queue, payload=name, max_attempts=5)
                try:
                    store.state.create_execution(run)
                    store.state.enqueue_work_item(item)
                except AlreadyExists:  # an earlier run made them: what it did is done
                    known += 1
        print(f"{len(keys)} files of {folder}, {known} of them known from an earlier run", flush=True)
        _demo_run(store, args.store, folder, queue)
        proven = _demo_table(store, keys)
    print(f"The store stays. To look at it:\n  {args.program} check '{args.store}'")
    if path:
        print(f"  sqlite3 '{os.path.relpath(path)}' 'SELECT execution_id, sequence, event FROM flowstore_log'")
    return 0 if proven else 1

def _demo_files(folder: str, store: str) -> Iterator[str]:
    """The files under the folder, by name; a link to nowhere, too, is for the workers to meet."""
    # Who opens and closes the store's files beside SQLite drops the locks on them, whatever link it came by.
    own = {_file_id(store + ending) for ending in ("", "-wal", "-shm", "-journal") if os.path.exists(store + ending)}
    for base, folders, names in os.walk(folder, onerror=lambda error: _complain(error, 1)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (os.path.join(base, name) for name in sorted(names) if not name.startswith(".")):
            if path.encode(errors="ignore") != os.fsencode(path):
                _complain(f"{path}: left out, for its name is not UTF-8", 1)
            elif not os.path.exists(path) or (os.path.isfile(path) and _file_id(path) not in own):
                yield os.path.relpath(path, folder)

def _demo_run(store: Store, target: str, folder: str, queue: str) -> None:
    """Start the workers, kill the first while it holds a lease, and wait until the others have done all."""
    def left() -> int:
        counts = store.stats()["queues"].get(queue, {})
        return int(counts.get("pending", 0) + counts.get("claimed", 0))
    start, run = functools.partial(_spawn, "demo-worker", target, folder, queue), new_id()[-6:]
    workers, held, done, total = list[Any](), list[WorkItem](), 0, left()
    if total == 0:
        return
    try:
        # Small files are done before anybody can look. So the first worker is told to sit on its first item,
        # and the others start when it was seen with the lease; lease, kill and take-over are real.
        workers.append(start(f"worker-1-{run}", "600"))
        while not held and workers[0].poll() is None:
            time.sleep(0.02)
            claimed = store.state.list_work_items(status="claimed", queue_type=queue, limit=1000)
            held = [item for item in claimed if item.worker_id == f"worker-1-{run}"]
        workers[0].kill()
        for item in held:
            print(f"killed worker-1-{run}, seen holding {item.payload} under fence {item.lease_fence}", flush=True)
        workers += [start(f"worker-{number}-{run}", "0") for number in (2, 3)]
        while done < total:
            before, done = done, total - left()
            if not _bar(sys.stdout, done, total, "files") and done > before:
                print(f"{done}/{total} files", flush=True)
            for item in held:
                new = store.state.get_work_item(item)
                if new is not None and new.lease_fence > item.lease_fence:
                    _expect_error(LeaseLost, store.state.complete_work_item, item)
                    _bar(sys.stdout)
                    fences = f"under fence {new.lease_fence}; fence {item.lease_fence} is refused now"
                    print(f"taken over: {item.payload}, {fences}", flush=True)
                    held = []
            if all(worker.poll() is not None for worker in workers):
                raise StorageError("all workers have ended before their time: run the demo again")
            time.sleep(0.1)
    finally:
        _bar(sys.stdout)
        for worker in workers:  # what one is amid stays leased, until the next run takes it over
            worker.kill()
            worker.communicate()

def _demo_worker(target: str, folder: str, queue: str, worker: str, pause: str) -> int:
    """Claim files and do them, until killed: the demo does so, and if it dies itself, standard input closes."""
    threading.Thread(target=lambda: os._exit(len(os.read(0, 1))), daemon=True).start()
    with open(target, lease_seconds=2, backoff=lambda attempt: 0.05) as store:  # short: somebody is watching
        while True:
            # Taken over meanwhile, or on a server another worker was first: nothing of ours was written.
            with contextlib.suppress(LeaseLost, StoreBusy):
                with store.transaction():  # so that the log tells of every lease that there was
                    if item := store.state.claim_work_item(worker, [queue]):
                        event = {"type": "step_started", "worker": worker, "fence": item.lease_fence}
                        store.events.append(item.execution_id, item.tenant_id, event)
                time.sleep(float(pause) if item else 0.05)
                if item:
                    _demo_do(store, item, os.path.join(folder, item.payload))

def _demo_do(store: Store, item: WorkItem, path: str) -> None:
    """Count and hash a file; its event and the end of its lease are one transaction, both or neither."""
    size, lines, words, digest, in_word = 0, 0, 0, hashlib.sha256(), False
    event: dict[str, Any] = {"type": "step_completed", "worker": item.worker_id, "fence": item.lease_fence}
    try:
        with store.state.hold(item), io.FileIO(path) as file:  # held, for a large file may outlast the lease
            while chunk := file.read(1 << 20):
                size, lines = size + len(chunk), lines + chunk.count(b"\n")
                words += len(chunk.split()) - (in_word and not chunk[:1].isspace())  # a word in two chunks
                in_word = not chunk[-1:].isspace()
                digest.update(chunk)
    except OSError as error:
        event |= {"type": "step_failed", "error": error.strerror or str(error)}
    else:
        event |= {"bytes": size, "lines": lines, "words": words, "sha256": digest.hexdigest()}
    with store.transaction():
        store.events.append(item.execution_id, item.tenant_id, event)
        if "error" not in event:
            store.state.complete_work_item(item)
            store.state.update_execution_status(item.execution_id, ExecutionStatus.COMPLETED)
        elif isinstance(store.state.retry_work_item(item, event["error"]), DeadLetter):
            store.state.update_execution_status(item.execution_id, ExecutionStatus.FAILED)

def _demo_table(store: Store, keys: list[str]) -> bool:
    """Print what the store tells of each file; True when it proves that each was done exactly once."""
    line = "{:40} {:>11} {:>8} {:>8}  {:12} {:>6}  {}".format
    special, plain, counts, once, dead, taken, gaps = list[str](), list[str](), list[int](), 0, 0, 0, 0
    for item in filter(None, map(store.state.get_work_item, keys)):
        stored = store.events.load_events(item.execution_id)
        counts.append(len(stored))
        gaps += [one.sequence for one in stored] != list(range(1, len(stored) + 1))
        started, done, failed = ([one.event for one in stored if one.event["type"] == kind]
                                 for kind in ("step_started", "step_completed", "step_failed"))
        killed = len(started) > len(done) + len(failed)  # a lease without an end: its worker was killed
        note = f"taken over: fences {', '.join(str(event['fence']) for event in started)}; " if killed else ""
        if item.status == "dead_lettered":
            note += f"dead letter after {item.attempt} tries: {item.last_error}"
        taken, dead = taken + killed, dead + (item.status == "dead_lettered")
        once += item.status == "completed" and len(done) == 1 and done[0]["fence"] == started[-1]["fence"]
        facts = [str(done[0][name])[:12] if done else "-" for name in ("bytes", "lines", "words", "sha256")]
        (special if note else plain).append(line(item.payload[-40:], *facts, len(stored), note).rstrip("; "))
    shown, lost = (special + plain)[:25], len(keys) - once - dead
    print(line("file", "bytes", "lines", "words", "sha256", "events", "").rstrip(), *shown, sep="\n")
    print(f"{len(keys)} files ({len(shown)} shown): {once} done exactly once, {dead} dead letters, {lost} lost; "
          f"{taken} taken over; {sum(counts)} events, {min(counts)} to {max(counts)} per execution, gaps in {gaps}")
    return once == len(keys) and not gaps

# --- bench: what the design promises, measured against plain sqlite3 in the same run ---
def _bench(args: Any) -> int:
    """Print each promise with what was measured; status 1 when one does not hold."""
    import platform
    import tempfile
    from statistics import median
    rounds, seconds, depth = (5, 0.2, 100_000) if args.quick else (11, 0.5, 1_000_000)
    machine = (f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, SQLite "
               f"{sqlite3.sqlite_version}{f'; quick, {depth:,} items for 1,000,000' if args.quick else ''}")
    event = {"type": "step_completed", "node": "charge", "worker": "worker-1", "result": "x" * 180}
    rows, say = list[dict[str, Any]](), functools.partial(print, file=io.StringIO() if args.json else None, flush=True)
    def row(name: str, ours: Callable[[], float], *others: tuple[str, float, Callable[[], float]]) -> None:
        """Measure ours against others (what, how many times its rate, itself): one median of the ratios has to hold."""
        rates, sides = list[list[float]](), [ours, *(measure for _, _, measure in others)]
        for turn in range(rounds + 1):
            _bar(sys.stderr, turn, rounds, name)
            found = {side: side() for side in (sides if turn % 2 else sides[::-1])}  # nobody is always first
            rates += [[found[side] for side in sides]] if turn else []  # the first round only warms up
        _bar(sys.stderr)
        ratios = [(what, median(some[0] / some[side] for some in rates), least)
                  for side, (what, least, _) in enumerate(others, 1)]
        ours_rate, holds = median(some[0] for some in rates), any(ratio >= least for _, ratio, least in ratios)
        rows.append({"name": name, "rate": ours_rate, "ratios": ratios, "holds": holds})
        shown = ", or ".join(f"{ratio:.2f} x {what} (at least {least})" for what, ratio, least in ratios)
        say(f"{'holds ' if holds else 'MISSES'} {name}: {shown}; {ours_rate:,.0f}/s")
    def new(synchronous: str) -> Store:
        return stack.enter_context(open(os.path.join(folder, f"{new_id()}.db"), synchronous=synchronous))
    def rate(operation: Callable[[], object]) -> float:
        done, start = 0, time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            operation()
            done += 1
        return done / (now - start)
    def plain(synchronous: str) -> Callable[[], float]:
        """The plain loop: the same row into the same table, one transaction each, and nothing else."""
        db = sqlite3.connect(new("FULL").target, isolation_level=None)
        stack.callback(db.close)
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute("PRAGMA fullfsync = ON")  # as the store does where there is such a thing
        columns, text = "execution_id, tenant_id, event, timestamp, sequence", json.dumps(event)
        sql = f"INSERT INTO flowstore_log ({columns}) VALUES ('run', 'default', ?, ?, ?)"
        sequences = iter(range(1, 2**62))
        def append() -> None:
            db.execute("BEGIN IMMEDIATE")
            db.execute(sql, (text, time.time_ns() // 1000, next(sequences)))
            db.execute("COMMIT")
        return lambda: rate(append)
    def append(store: Store, thread: int = 0) -> float:
        return rate(lambda: store.events.append(f"run-{thread}", "default", event))
    def fill(store: Store, queue: str, items: int, what: str = "pending") -> None:
        """Add items that are due for an hour already, or in a day when delayed: copies of one by the API."""
        template = store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type=queue))
        due = f"available_at + n + {(86_400 if what == 'delayed' else -3_600) * 1_000_000}"
        changed = {"id": "id || printf('-%07d', n)", "available_at": due,
                   "status": "'completed'" if what == "completed" else "'pending'",
                   "tenant_id": "'other'" if what == "of another tenant" else "tenant_id"}
        sql = (f"INSERT INTO flowstore_work_items ({_ITEM.columns}) "
               "WITH RECURSIVE numbers (n) AS (SELECT ? UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < ?) "
               f"SELECT {', '.join(changed.get(name, name) for name in _ITEM.names)} "
               "FROM flowstore_work_items CROSS JOIN numbers WHERE id = ?")
        for start in range(0, items, 50_000):
            with store.transaction() as tx:
                tx.execute(sql, (start, min(start + 50_000, items), template))
    def claim(store: Store, what: str, *queues: str) -> float:
        state = store.state.for_tenant("default") if what == "of another tenant" else store.state
        start = time.perf_counter()
        for _ in range(200):
            if (item := state.claim_work_item("worker", queues)) is None:
                raise StorageError("the queue ran dry")
            state.complete_work_item(item)
        passed = time.perf_counter() - start
        fill(store, "a", 200)  # outside the time
        return 200 / passed
    def claims(what: str, *queues: str) -> None:
        few, many = new("NORMAL"), new("NORMAL")  # waiting for the disk would hide what a claim costs
        for store, items in ((few, 0), (many, depth)):
            store.events.append("run", "default", event)
            fill(store, "a", items, what)
            for queue in queues:
                fill(store, queue, 1_000 if queue == "a" else 10_000 if items else 1)
        name = f"claim + complete, {depth:,} {what}" + (", asking for three queues" if queues[1:] else "")
        base = ("that with 1,000 pending", 0.8, lambda: claim(few, what, "a"))
        row(name, lambda: claim(many, what, *queues), base)
    def persisting() -> None:
        host, pointers = new("NORMAL").workflows, [ExecutionPointer(step_id=n, outcome=event) for n in range(1000)]
        instance = WorkflowInstance(workflow_definition_id="bench", execution_pointers=pointers)
        instance.id = host.create_new_workflow(instance)
        def persist(*steps: list[ExecutionPointer]) -> None:
            pointers[500].retry_count += 1
            for instance.execution_pointers in steps:
                host.persist_workflow(instance)
        row("persist_workflow, 1,000 pointers, one changed", lambda: rate(lambda: persist(pointers)),
            ("deleting and rewriting all", 10.0, lambda: rate(lambda: persist([], pointers))))
    def pruning() -> None:
        store, flows = new("FULL"), depth // 10
        flow = store.flows.insert(Flow(status=FlowStatus.FINISHED, updated_at=datetime(2000, 1, 1, tzinfo=UTC)))
        copied = ", ".join({"id": "id || n"}.get(name, name) for name in _FLOW.names)
        numbers = f"WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {flows})"
        with store.transaction() as tx:
            tx.execute(f"INSERT INTO flows ({_FLOW.columns}) {numbers} SELECT {copied} FROM flows, numbers")
            tx.execute("INSERT INTO flow_events (flow_id, kind, payload, at) SELECT id, 'ended', '{}', 0 FROM flows")
        waits, pruner = list[float](), threading.Thread(target=store.flows.prune_terminal_flows, args=(1,))
        pruner.start()
        while pruner.is_alive():
            start = time.perf_counter()
            store.events.append(flow.id, "default", event)
            waits.append(time.perf_counter() - start)
        wait = sorted(waits)[len(waits) * 99 // 100]
        row(f"a writer's wait while {flows:,} flows are pruned, 99th percentile, as a rate", lambda: 1 / wait,
            ("one in 50 ms", 1.0, lambda: 20.0))
    with (tempfile.TemporaryDirectory(prefix="flowstore-", ignore_cleanup_errors=True) as folder,
          contextlib.ExitStack() as stack):
        say(machine)
        full, normal, loop, relaxed = new("FULL"), new("NORMAL"), plain("FULL"), plain("NORMAL")
        row("durable append, 1 thread, FULL", lambda: append(full), ("plain FULL", 0.85, loop))
        row("append, 1 thread, NORMAL", lambda: append(normal), ("plain NORMAL", 0.7, relaxed))
        row("durable append, 64 threads, FULL", lambda: sum(_in_threads(64, functools.partial(append, full))),
            ("plain FULL", 4.0, loop), ("plain NORMAL", 0.4, relaxed))
        for what, *queues in (("pending", "a"), ("pending", "a", "b", "c"), ("delayed", "a"), ("completed", "a"),
                              ("of another tenant", "a")):
            claims(what, *queues)
        persisting()
        pruning()
    missed = sum(not one["holds"] for one in rows)
    result = {"machine": machine, "quick": args.quick, "rows": rows, "holds": not missed}
    print(json.dumps(result) if args.json else f"{len(rows) - missed} hold, {missed} missed")
    return 1 if missed else 0

# --- check, backup, compact ---
def _check(args: Any) -> int:
    """Print the problems of a store; status 1 when there are any."""
    with open(args.store, read_only=True) as store:
        problems = store.check()
    lines = [*problems, f"{args.store}: {f'{len(problems)} problems' if problems else 'sound'}"]
    print(json.dumps({"store": args.store, "problems": problems}) if args.json else "\n".join(lines))
    return 1 if problems else 0

def _backup(args: Any) -> int:
    """Write a consistent copy of a store."""
    with open(args.store, read_only=True) as store:
        store.backup(args.path)
    print(f"{args.path}: {os.path.getsize(args.path):,} bytes")
    return 0

def _compact(args: Any) -> int:
    """Shrink a store's file, and say to what."""
    with contextlib.suppress(SchemaError):  # an older schema is fine: opening it to write upgrades it
        open(args.store, read_only=True).close()  # a mistyped name must not make a new store
    with open(args.store) as store:
        store.compact()
        print(f"{args.store}: {store.stats()['file_bytes']:,} bytes")
    return 0

# Each command: the function, which returns the exit status, what it is about, and its arguments as argparse has them.
_STORE: dict[str, dict[str, Any]] = {"store": {"metavar": "STORE", "help": "a database file or URL"}}
_JSON_OUT: dict[str, dict[str, Any]] = {"--json": {"action": "store_true", "help": "print JSON, for programs"}}
_COMMANDS: dict[str, tuple[Callable[[Any], int], str, dict[str, dict[str, Any]]]] = {
    "selftest": (_selftest, "check in a few seconds that this copy works on this machine", {
        "--target": {"metavar": "STORE", "help": "try this store (default: a temporary file)"}}),
    "demo": (_demo, "count the words of a folder's files with several processes, one of which is killed on the way", {
        "folder": {"nargs": "?", "default": ".", "metavar": "FOLDER", "help": "default: ., without hidden files"},
        "--limit": {"type": int, "default": 200, "metavar": "N", "help": "at most so many files (default: 200)"},
        "--store": {"default": "flowstore-demo.db", "metavar": "FILE", "help": "default: flowstore-demo.db"}}),
    "bench": (_bench, "measure what the design promises against plain sqlite3", _JSON_OUT | {
        "--quick": {"action": "store_true", "help": "under 30 s, with 100,000 items for 1,000,000"}}),
    "check": (_check, "read the whole store and list what is wrong with it", _STORE | _JSON_OUT),
    "backup": (_backup, "copy a store, also one in use, into a new file", _STORE | {"path": {"metavar": "FILE"}}),
    "compact": (_compact, "give space that a store no longer needs back to the file system", _STORE),
}
_HELPERS: dict[str, Callable[..., int]] = {"demo-worker": _demo_worker, "selftest-writer": _selftest_writer}

# ============================================================================================================
# PostgreSQL: a server in place of the file; without this chapter all the others work as before
# ============================================================================================================

# What each of our statements says to SQLite it says to PostgreSQL too, once its placeholders are numbered. Writers
# run side by side: SERIALIZABLE, and begun again when they lose, or READ COMMITTED where the lock on a row is enough.
# The numbers that order the logs over the whole store begin with that of their transaction (and leave 2**20 for its
# rows): reading up to the oldest transaction under way, nobody skips what commits later with a lower number. `base` is
# added where the server counts from below what is stored, as it does after a dump was restored.
_CONNECTIONS = 8  # of one process, at most: callers wait for one; more would only wait for each other in the server
_NUMBER = """BIGINT PRIMARY KEY DEFAULT ((pg_current_xact_id()::text::bigint + 0 << 20) + set_config('flowstore.number',
    (COALESCE(NULLIF(current_setting('flowstore.number', true), ''), '0')::bigint + 1)::text, true)::bigint)"""
_NUMBERED = (("flow_events", "id"), ("execution_errors", "id"), ("flowstore_log", "position"))
_FIRST = "(SELECT {}::text::bigint + value::bigint << 20 FROM flowstore_meta WHERE key = 'base')".format
_SETTLED = (f"position > ? AND (position < {_FIRST('pg_snapshot_xmin(pg_current_snapshot())')} "
            f"OR position >= {_FIRST('pg_current_xact_id_if_assigned()')})")
_IN_POSTGRES = (  # how the schema's words read there; an index entry of 2,700 bytes holds two ids
    (r"INTEGER PRIMARY KEY( AUTOINCREMENT)?", _NUMBER), (r"\bINTEGER\b", "BIGINT"), (r"\bBLOB\b", "BYTEA"),
    (r"\bTEXT\b", 'TEXT COLLATE "C"'), (r" WITHOUT ROWID", ""),
    (r"\(status, ([^)]*)\)\s+WHERE status = '([a-z])", r"((status || ''), \1) WHERE status || '' = '\2"),
    (r"(\(\(status \|\| ''\), (?:tenant_id, )?)queue_type", r"\1(queue_type || '')"),
    (r"(event_name, event_key, \w+|tenant_id, \(queue_type \|\| ''\), \w+), id\)", r"\1)"),
    (r", PRIMARY KEY (\(tenant_id, workflow_id), version\)\)",
     r"); CREATE UNIQUE INDEX flowstore_definitions_key ON flowstore_definitions \1, md5(version))"),
)
_PLACEHOLDERS = re.compile(  # what holds no placeholder, a placeholder, a named one
    r"""([eE]'(?:[^'\\]|\\.|'')*'|'[^']*'|"[^"]*"|--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\2\$|::)|\?|:([A-Za-z_]\w*)""",
    re.DOTALL,
)
_NEWS = re.compile("INSERT INTO flowstore_(log|work_items)|UPDATE flowstore_work_items SET status = 'pending'")

@functools.lru_cache(2000)
def _in_postgres(sql: str, level: str, named: bool = False) -> tuple[str, tuple[str, ...]]:
    """A statement with $1, $2, ... for its placeholders, and with the locks that its isolation level asks for."""
    names: list[str] = []

    def number(found: re.Match[str]) -> str:
        if found[1] or (found[3] and not named):
            return found[0]
        names.append(found[3] or "")
        return f"${len(names)}"

    if level and "q.column1" in sql:  # a claim's look: what another one is claiming is skipped
        sql = sql.replace("available_at, id LIMIT 1", "available_at, id LIMIT 1 FOR UPDATE SKIP LOCKED")
    if level and sql.startswith("SELECT") and "AND status = 'claimed' AND lease_expires_at <= ?" in sql:
        sql += " FOR UPDATE SKIP LOCKED"
    elif level == "READ COMMITTED" and sql.startswith("SELECT") and "FROM flowstore_work_items WHERE id = ?" in sql:
        sql += " FOR UPDATE"
    # The planner trusts statistics that are late, so it is left one index: for an item that is known not that of all in
    # its status, for the head of a queue not that of all that ever were in it.
    if "flowstore_work_items" in sql and re.search("(WHERE|AND) status (=|<>) '", sql):
        sql = re.sub("(WHERE|AND) status (=|<>) '", r"\1 status || '' \2 '", sql)
        if sql.startswith("SELECT"):
            sql = re.sub(r"\bqueue_type\b", "(queue_type || '')", sql)
    sql = sql.replace("flowstore_log WHERE position > ?", f"flowstore_log WHERE {_SETTLED}")
    return _PLACEHOLDERS.sub(number, sql), tuple(names)

class _PostgresRows(list[tuple[Any, ...]]):
    """What a statement gave, as a cursor of sqlite3's tells it."""
    fetchall = list.copy

    def __init__(self, cursor: Any) -> None:
        super().__init__(cursor.fetchall() if cursor.description else ())
        self.rowcount = cursor.rowcount

class _PostgresDb:
    """A psycopg connection with what the rest of this module uses of sqlite3's; its errors are ours."""

    def __init__(self, engine: _PostgresEngine) -> None:
        self.engine = engine
        self.level = ""  # the isolation of the transaction, when it writes
        self.number = ""  # of that transaction, in the server
        self.news = False  # it wrote something that others may be waiting for
        psycopg = engine.psycopg
        try:
            self.db = psycopg.connect(engine.url, autocommit=True, cursor_factory=psycopg.RawCursor)
        except psycopg.Error as error:
            says = " ".join(str(error).split())
            kind = StoreBusy if re.search("starting up|shutting down|too many|connection slots", says) else StorageError
            raise kind(f"{engine.target}: the server cannot be used: {says}") from error
        self.close = self.db.close
        self._call(self.db.execute, engine.settings)
        self.since = self._call(self.db.execute, """SELECT pg_postmaster_start_time(), MAX(backend_start) FROM
            pg_stat_activity WHERE backend_type = 'checkpointer'""").fetchone()  # restarted, it may use a number again

    @property
    def in_transaction(self) -> bool:
        """True while a transaction is open on it."""
        return self.db.info.transaction_status.name in ("ACTIVE", "INTRANS", "INERROR")

    def begin(self, level: str) -> None:
        """Begin a transaction: one that writes, at a level of isolation, or else one that reads one snapshot."""
        self.level, self.news = level, False
        if level:
            cursor = self._call(self.db.execute, f"BEGIN ISOLATION LEVEL {level}; SELECT pg_current_xact_id()")
            cursor.nextset()
            self.number = cursor.fetchone()[0]
        else:
            self._call(self.db.execute, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def execute(self, sql: str, parameters: Any = ()) -> _PostgresRows:
        """Run a statement, ours or the user's."""
        if sql.startswith("PRAGMA"):  # check() asks what SQLite thinks of its file
            return self._execute("SELECT 1 WHERE false", "", ())
        rows = self._execute(sql, self.level, parameters)
        if self.level and "q.column1" in sql and not any(row[2] for row in rows):
            return self._execute(sql, "", parameters)  # what another claim skips may become free: wait for its end
        return rows

    def _execute(self, sql: str, level: str, parameters: Any) -> _PostgresRows:
        text, values = self._prepared(sql, level, parameters)  # prepared, a text of several statements is refused
        return _PostgresRows(self._call(self.db.execute, text, values, prepare=True if ";" in sql else None))

    def executemany(self, sql: str, rows: Iterable[Any]) -> _PostgresRows:
        """Run a statement for each of the rows."""
        texts = [self._prepared(sql, self.level, row) for row in rows] or [("SELECT 1 WHERE false", ())]
        cursor = self.db.cursor()
        self._call(cursor.executemany, texts[0][0], [values for _, values in texts])
        return _PostgresRows(cursor)

    def _prepared(self, sql: str, level: str, parameters: Any) -> tuple[str, Sequence[Any]]:
        """The text of a statement, and its values in the order of their numbers."""
        text, names = _in_postgres(sql, level, named := isinstance(parameters, dict))
        values = [parameters[name] for name in names] if named else parameters
        if "\0" in sql or len(values) != len(names):
            raise StorageError(f"the statement has {len(names)} placeholders for {len(values)} values, or holds NUL")
        self.news = self.news or _NEWS.search(sql) is not None
        return text, values

    def commit(self) -> None:
        """Commit; those who wait hear of it, by a transaction of its own: NOTIFY would make commits queue up."""
        self._call(self.db.execute, f"COMMIT; NOTIFY {self.engine.schema}" if self.news else "COMMIT")
        self.level = ""

    def rollback(self) -> None:
        """Roll back what is open, if anything."""
        self.level = ""
        if self.in_transaction:
            try:
                self.db.rollback()
            except self.engine.psycopg.Error:
                self.db.close()

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call psycopg. A lost race or connection is StoreBusy: it has ended the transaction, nothing was written."""
        before = sys.exception()
        try:
            return method(*arguments, **options)
        except BaseException as error:
            struck: BaseException | None = error
            while isinstance(struck, Exception) and struck is not before:
                struck = struck.__context__
            try:
                if struck is not None and struck is not before:  # an interrupt, perhaps under what psycopg made of it
                    self.db.close()  # it may be out of step with the server
                    raise struck
            finally:
                del struck, before  # their tracebacks lead back to this frame
            if not isinstance(error, self.engine.psycopg.Error):
                raise
            code, told = error.sqlstate or "", error.diag
            says = " ".join(str(told.message_primary or error).split())
            # A row of ours that is there against what was seen, or no longer: another transaction was first.
            ours = told.schema_name == self.engine.schema and told.table_name in _TABLE_NAMES
            if self.db.closed or code in ("40001", "40P01", "55P03") or (ours and code in ("23503", "23505")):
                self.rollback()
                raise StoreBusy(f"another transaction was first, nothing was written: run it again ({says})") from error
            kind = {"53100": StoreFull, "XX001": StoreCorrupt, "XX002": StoreCorrupt}.get(code, StorageError)
            raise kind(f"the database failed: {says}") from error

def _below(tx: _Tx) -> _PostgresDb:
    """What a transaction here runs on."""
    db: Any = tx.db
    below: _PostgresDb = db
    return below

class _PostgresEngine(_Engine):
    """A database on a PostgreSQL server: each call has a connection and a transaction of its own."""
    tick = 0.1

    def __init__(self, target: str, options: _Options) -> None:
        import importlib
        import urllib.parse
        try:
            self.psycopg: Any = importlib.import_module("psycopg")
        except ImportError as error:
            raise StorageError("a server's URL needs psycopg: pip install 'flowstore[postgres]'") from error
        parts = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        self.schema = query.pop("schema", "flowstore")
        if not re.fullmatch("[a-z_][a-z0-9_]{0,62}", self.schema):
            raise InvalidData(f"target: a schema's name is made of a-z, 0-9 and _, not {self.schema!r}")
        self.url = parts._replace(query=urllib.parse.urlencode(query)).geturl()
        login, at, host = parts.netloc.rpartition("@")
        target = parts._replace(netloc=login.split(":")[0] + at + host, query=re.sub(
            "(^|&)(ssl)?password=[^&]*", "", parts.query)).geturl()
        self.settings = f"""SET search_path = {self.schema}, public; SET jit = off; SET enable_seqscan = off;
            SET plan_cache_mode = force_generic_plan;
            SET lock_timeout = {max(1, int(min(options.busy_timeout, 2e6) * 1000))};
            SET synchronous_commit = {'on' if options.synchronous == 'FULL' else 'off'};
            SET default_transaction_read_only = {'on' if options.read_only else 'off'}"""
        self.blocks: dict[int, Callable[[], Any]] = {}  # by thread, a reference to the block it opened last
        self._permit_all()
        super().__init__(target, None, options)

    def _permit_all(self) -> None:
        from queue import SimpleQueue
        self.permits: SimpleQueue[None] = SimpleQueue()
        for _ in range(_CONNECTIONS):
            self.permits.put(None)

    def _connect(self) -> Any:
        self._refuse_closed()
        return _PostgresDb(self)

    def _borrow(self) -> _Connection:
        """A connection for one call or block; StoreBusy while all of them are in use."""
        from queue import Empty
        deadline = time.monotonic() + self.options.busy_timeout
        while True:
            self._refuse_closed()
            try:
                self.permits.get(timeout=max(0.0, min(0.1, deadline - time.monotonic())))
                break
            except Empty:
                with self.mutex:  # a block that was dropped, or an interrupt, leaves a permit behind: count them
                    if sum(one.lent for one in self.connections) < _CONNECTIONS:
                        break
                if time.monotonic() >= deadline:
                    raise StoreBusy(f"all {_CONNECTIONS} connections of this store were in use too long") from None
        try:
            connection = self.readers.pop()
        except IndexError:
            connection = self._new_connection()
        connection.lent = True
        return connection

    def _give_back(self, connection: _Connection) -> None:
        with connection.lock:
            if connection.tx is not None:
                _below(connection.tx).rollback()  # if it was left open
            if self.closed or (connection.tx is not None and _below(connection.tx).db.closed):
                connection.close()  # opened again at its next use
        connection.lent = False
        self.readers.append(connection)
        if self.permits.qsize() < _CONNECTIONS:
            self.permits.put(None)

    # --- opening ---
    def _prepare(self) -> None:
        """Create or upgrade the tables in their schema, whoever else opens it at the same time."""
        self._patiently(lambda: self._with_connection(self._prepare_schema))

    def _prepare_schema(self, tx: _Tx) -> None:
        if self._version(tx) == _SCHEMA_VERSION and (self.options.read_only or not self._numbers_behind(tx)):
            return
        if self.options.read_only:
            raise SchemaError("the tables are of an older version: open the store once without read_only")
        tx.run("BEGIN")
        tx.rows("SELECT pg_advisory_xact_lock(hashtext(?))", self.schema)
        if (version := self._version(tx)) is None:
            tx.run(f"CREATE SCHEMA IF NOT EXISTS {self.schema}")
        self._build(tx, version)
        if version is None:
            tx.run("INSERT INTO flowstore_meta (key, value) VALUES ('base', '0')")
        if behind := self._numbers_behind(tx):
            tx.run("UPDATE flowstore_meta SET value = ? WHERE key = 'base'", str(behind))
            for table, column in _NUMBERED:
                number = _NUMBER.replace("+ 0 <<", f"+ {behind} <<").split(" DEFAULT ")[1]
                tx.run(f"ALTER TABLE {table} ALTER {column} SET DEFAULT {number}")
        tx.run("COMMIT")

    def _tables(self, tx: _Tx) -> set[str]:
        return {name for (name,) in tx.rows("SELECT relname::text FROM pg_class WHERE relkind IN ('r', 'v') AND "
                                            "relnamespace = to_regnamespace(?)", self.schema)}

    def _numbers_behind(self, tx: _Tx) -> int:
        """The base with which new numbers lie above all that are stored; 0 while they do."""
        top = max(tx.rows(f"SELECT COALESCE(MAX({column}), 0) >> 20 FROM {table}")[0][0] for table, column in _NUMBERED)
        base, following = tx.rows("SELECT value::bigint, pg_snapshot_xmax(pg_current_snapshot())::text::bigint "
                                  "FROM flowstore_meta WHERE key = 'base'")[0]
        return int(top - following + 1) if top >= base + following else 0

    @staticmethod
    def ddl(script: str) -> str:
        """The schema, as PostgreSQL words it."""
        for pattern, meaning in _IN_POSTGRES:
            script = re.sub(pattern, meaning, script)
        return script

    # --- running operations ---
    def run(self, operation: _Operation[Any, Any, Any], facet: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation: in the caller's open transaction, or in one of its own until it wins."""
        if _blocks.get() and (block := self.block()) is not None:
            return block.run(operation, facet, args, kwargs)
        if operation.writes:
            self.refuse_to_wait_for_oneself()
            if self.options.read_only:
                raise StorageError("the store was opened read-only: nothing can be changed through it")
        level = "READ COMMITTED" if operation.row else "SERIALIZABLE" if operation.writes else ""

        def run(tx: _Tx) -> Any:
            if operation.writes or operation.snapshot:
                _below(tx).begin(level)
            result = operation.run(facet, tx, args, kwargs)
            if operation.writes:
                self.commit_there(tx)
            return result

        return self._patiently(lambda: self._with_connection(run))

    def refuse_to_wait_for_oneself(self) -> None:
        """StorageError for what another task of this thread, with its open block, might hold up for ever."""
        if (block := self.blocks.get(threading.get_ident(), bool)()) and block.is_open:
            raise StorageError("this thread has another task's transaction open and could only wait for itself")

    def _with_connection(self, action: Callable[[_Tx], R]) -> R:
        connection = self._borrow()
        try:
            with connection.lock:
                return action(connection.use())
        finally:
            self._give_back(connection)

    def commit_there(self, tx: _Tx) -> None:
        """Commit; when the connection is lost in the middle, the server is asked what became of it."""
        try:
            _below(tx).commit()
        except StoreBusy:
            if not _below(tx).db.closed or not self._has_committed(_below(tx)):
                raise

    def _has_committed(self, lost: _PostgresDb) -> bool:
        deadline = time.monotonic() + self.options.busy_timeout
        while True:
            try:
                status, since = self.aside(lambda tx: (
                    tx.rows("SELECT pg_xact_status(?::xid8)", lost.number)[0][0], _below(tx).since))
            except StorageError:
                status, since = "in progress", None
            if status == "committed" and since == lost.since:
                return True
            if status == "committed" or self.closed or time.monotonic() > deadline:
                raise StorageError("the server was lost during COMMIT: look whether this was stored")
            if status != "in progress":
                return False
            time.sleep(0.05)

    def aside(self, action: Callable[[_Tx], R]) -> R:
        """Run `action` on one snapshot, on a connection of its own."""
        connection = self._new_connection()
        with connection.lock:
            try:
                tx = connection.use()
                _below(tx).begin("")
                return action(tx)
            finally:
                connection.close()

    def transaction(self) -> _Block:
        """A new transaction block, not begun."""
        return _PostgresBlock(self)

    def wait(self, seen: int, seconds: float) -> Any:
        """Wait until the server tells of a commit; one thread listens for all of them."""
        self._refuse_closed()
        deadline = time.monotonic() + min(seconds, self.tick)
        if not self.writer.lock.acquire(blocking=False):
            return super().wait(seen, seconds)
        try:
            listening, db = self.writer.tx is not None, _below(self.writer.use())
            if not listening:  # what was committed until now may not have been seen
                db.execute(f"LISTEN {self.schema}")
            elif not self.closed and self.commits == seen:
                for _ in db.db.notifies(timeout=max(0.0, deadline - time.monotonic()), stop_after=1):
                    self.commits += 1
        except (StorageError, self.psycopg.Error):
            self.writer.close()
            time.sleep(max(0.0, deadline - time.monotonic()))
        finally:
            self.writer.lock.release()
            self._wake_watchers()  # another one listens now

    def sizes(self, tx: _Tx) -> dict[str, int]:
        """Bytes of the tables; the log beside them is the server's."""
        sql = "SELECT COALESCE(SUM(pg_total_relation_size(to_regclass(name)))::bigint, 0) FROM unnest(?::text[]) name"
        return {"file_bytes": tx.rows(sql, list(_TABLE_NAMES))[0][0], "wal_bytes": 0}

    def _copy_to(self, tx: _Tx, path: str) -> None:
        """A backup is an SQLite file."""
        with open(path) as store:
            _copy_tables(tx.rows, store)

    def compact(self) -> None:
        """Have the server find the space that is free again."""
        if self.options.read_only:
            raise StorageError("the store was opened read-only: nothing can be changed through it")
        self._with_connection(lambda tx: tx.run(f"VACUUM (ANALYZE) {', '.join(_TABLE_NAMES)}"))

    # --- fork ---
    def before_fork(self) -> None:
        """The parent goes on as if nothing had happened."""

    after_fork_in_parent = before_fork

    def after_fork_in_child(self) -> None:
        """Begin anew: the connections are the parent's, and even closing one here would end it there."""
        for connection in list(self.connections):
            if connection.tx is not None:
                _keep_for_ever(_below(connection.tx).db)
            connection.lock, connection.tx = threading.RLock(), None
        self.mutex, self.watching, self.readers = threading.RLock(), set(), []
        self._permit_all()

class _PostgresBlock(_Block):
    """A block has a connection of its own. One that loses against another transaction is StoreBusy, and run again."""
    engine: _PostgresEngine

    def _acquire(self) -> None:
        self.engine.refuse_to_wait_for_oneself()
        self.engine._patiently(self._begin)
        self.engine.blocks[self.thread] = self._ref

    def _begin(self) -> None:
        self._connection = self.engine._borrow()
        try:
            with self._connection.lock:
                _below(self._connection.use()).begin("" if self.engine.options.read_only else "SERIALIZABLE")
        except BaseException:
            self._release()
            raise

    def _finish(self, tx: _Tx, commit: bool) -> None:
        if commit:
            self.engine.commit_there(tx)

    def _release(self) -> None:
        self.engine._give_back(self._connection)

_SERVERS |= {"postgresql": _PostgresEngine, "postgres": _PostgresEngine}

# --- copy: a store moves from one engine to the other ---
_COPIED = {  # by table, its columns and those of its key; referred ones first
    name: (re.findall(r"(\w+) (?:TEXT|INTEGER|BLOB)", columns),
           (re.findall(r"PRIMARY KEY \(([^)]+)\)", columns) or re.findall(r"(\w+) \w+ PRIMARY KEY", columns))[0])
    for name, columns in re.findall(r"CREATE TABLE (\w+) (.*)", " ".join(_TABLES.split()).replace("; ", ";\n"))
    if name != "flowstore_meta"
}

def _table_rows(rows: Callable[..., list[tuple[Any, ...]]], table: str, after: tuple[Any, ...] | None = None
                ) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of a table behind a key, in the order of its key, some hundred at a time."""
    columns, key = _COPIED[table]
    places = [columns.index(name) for name in key.split(", ")]
    marks = ", ".join("?" * len(places))
    while True:
        behind = f"WHERE ({key}) > ({marks})" if after is not None else ""
        found = rows(f"SELECT {', '.join(columns)} FROM {table} {behind} ORDER BY {key} LIMIT 500", *(after or ()))
        if not found:
            return
        yield found
        after = tuple(found[-1][place] for place in places)

def _copy_tables(rows: Callable[..., list[tuple[Any, ...]]], target: Store, tell: Callable[[int], Any] = bool) -> None:
    """Copy what `rows` reads into a new store, or go on with a copy that was broken off."""
    with target.transaction() as tx:
        if not tx.execute("SELECT 1 FROM flowstore_meta WHERE key = 'copying'"):
            if sum(target.stats()["tables"].values()) > len(tx.execute("SELECT 1 FROM flowstore_meta")) + 1:
                raise StorageError(f"{target.target}: there is a store already: copy into a new one")
            tx.execute("DELETE FROM flowstore_tenants")
            tx.execute("INSERT INTO flowstore_meta (key, value) VALUES ('copying', '')")
    done = 0
    for table, (columns, key) in _COPIED.items():
        insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        order = ", ".join(f"{name} DESC" for name in key.split(", "))
        with target.transaction() as tx:
            last = tx.execute(f"SELECT {key} FROM {table} ORDER BY {order} LIMIT 1")
            done += tx.execute(f"SELECT COUNT(*) FROM {table}")[0][0]
        for chunk in _table_rows(rows, table, last[0] if last else None):
            with target.transaction() as tx:
                tx.executemany(insert, chunk)
            tell(done := done + len(chunk))
    with target.transaction() as tx:
        tx.execute("DELETE FROM flowstore_meta WHERE key = 'copying'")

def _copy_command(args: Any) -> int:
    """Copy a store into a new one, of either engine, and compare them; status 1 when they differ."""
    with open(args.source, read_only=True) as source, source.transaction() as read:  # one snapshot
        rows: Callable[..., list[tuple[Any, ...]]] = lambda sql, *values: read.execute(sql, values)  # noqa: E731
        total = sum(rows(f"SELECT COUNT(*) FROM {table}")[0][0] for table in _COPIED)
        with open(args.target) as target:
            _copy_tables(rows, target, lambda done: _bar(sys.stdout, done, total, "rows"))
        _bar(sys.stdout)
        with open(args.target) as target, target.transaction() as copy:
            other = lambda sql, *values: copy.execute(sql, values)  # noqa: E731
            differ = [table for table in _COPIED if any(
                one != two for one, two in itertools.zip_longest(_table_rows(rows, table), _table_rows(other, table)))]
    print(f"{args.target}: {total:,} rows,", f"other than the source in {', '.join(differ)}" if differ else "equal")
    return 1 if differ else 0

_COMMANDS["copy"] = (_copy_command, "copy a store into a new one, from SQLite to PostgreSQL or back", {
    "source": {"metavar": "SOURCE", "help": "a database file or URL"},
    "target": {"metavar": "TARGET", "help": "a new one, or one into which this copy was broken off"}})


if __name__ == "__main__":
    raise SystemExit(main())
