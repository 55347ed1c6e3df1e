"""Work on many files on the machines of a Ray cluster; the same results in the same order as on one machine.

Every machine must see the same files under the same paths, and have the same contentv, OpenCV and PyAV: what a worker
computes would otherwise depend on where it runs. Both are checked when the pool opens, on each machine of the cluster.
Ray carries tasks and results between processes and keeps nothing of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from contentv.base.errors import UserError
from contentv.base.log import get_logger
from contentv.curation.ray_address import KEY, answers, joined_here, require_head
from contentv.curation.ray_node import NodeFacts, facts_here, unfit, unfit_nodes
from contentv.curation.workers import AHEAD, WorkerCrashError, limit_threads

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_LOST_NODES = 10  # machines that one task may lose; more is a cluster that does not hold still
RECOUNT_S = 5.0  # how often the cluster is asked for its size: machines come and go


class RayPool:
    """The workers of a Ray cluster, one for each of its CPUs; see `contentv.curation.workers.Pool`.

    Args:
        address: "host:port" of the cluster's head, "auto" for the cluster that this machine is a node of, or empty for
            the one that it joined by `ray start`, if there is one, and otherwise a Ray started here and ended with the
            block.
        workers: processes of a Ray that is started here; a cluster's own CPUs count otherwise.
        visible: files and folders that every machine must see.
        wait_s: longest wait for the head to answer, in seconds.
    """

    def __init__(self, address: str = "", workers: int = 1, visible: Sequence[str] = (), wait_s: float = 5.0) -> None:
        self._ray = _import_ray()
        self._address = address
        self._started_workers = workers
        self._visible = [os.path.abspath(path) for path in visible if path and "://" not in path]
        self._wait_s = wait_s
        self._here = (os.getcwd(), NodeFacts())  # what relative names in tasks mean, and what workers must have
        self._connected_here = False
        self._remote: dict[int, Any] = {}  # CPUs of a task -> `_work` with them
        self._size = (-RECOUNT_S, 1)  # when the CPUs were counted, and how many there were

    @property
    def workers(self) -> int:
        """How many tasks are worked on at a time: the cluster's CPUs, as they are now."""
        now = time.monotonic()
        if not self._ray.is_initialized():
            return self._started_workers
        if now - self._size[0] >= RECOUNT_S:
            self._size = (now, max(1, int(self._ray.cluster_resources().get("CPU", 0))))
        return self._size[1]

    def __enter__(self) -> RayPool:
        if self._ray.is_initialized():
            return self._checked()
        with _own_signals():
            self._connect()
        self._connected_here = True
        try:
            return self._checked()
        except BaseException:
            self._disconnect()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connected_here:
            self._disconnect()

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int = AHEAD
    ) -> Iterator[tuple[Task, Result | WorkerCrashError]]:
        """Yields (task, function(task)) in the order of the tasks, see `Pool.map`.

        Raises:
            UserError: a machine that joined later is not like the others, or machines keep dying.
        """
        waiting: deque[tuple[Task, Any]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._submit(function, task)))
                if len(waiting) >= ahead * self.workers:
                    first, job = waiting.popleft()
                    outcome = self._result(function, first, job)
                    yield first, outcome
            while waiting:
                first, job = waiting.popleft()
                outcome = self._result(function, first, job)
                yield first, outcome
        finally:
            if self._ray.is_initialized():
                for _, job in waiting:
                    self._ray.cancel(job, force=True)

    def _submit(self, function: Callable[[Task], Result], task: Task, *, alone: bool = False) -> Any:
        cpus = self._cpus_of_smallest_node() if alone else 1
        if cpus not in self._remote:  # made once: to Ray each one made is another kind of work
            # Ray itself retries nothing: a task that kills its process must not do so again beside others.
            self._remote[cpus] = self._ray.remote(num_cpus=cpus, max_retries=0, scheduling_strategy="SPREAD")(_work)
        return self._remote[cpus].remote(self._here, self._visible, function, task)

    def _result(self, function: Callable[[Task], Result], task: Task, job: Any) -> Result | WorkerCrashError:
        """Waits for a result. What a dead machine took with it is done again elsewhere; where the worker alone died,
        the task is done once more with a machine to itself, to see whether it is the cause."""
        errors = self._ray.exceptions
        crashed = False
        for _ in range(MAX_LOST_NODES):
            try:
                # Ray hands out arrays that cannot be written to and that lie in its shared memory.
                result: Result = copy.deepcopy(self._ray.get(job))
                return result
            except errors.RayTaskError as error:
                raise _cause(error) from error
            except (errors.WorkerCrashedError, errors.OutOfMemoryError):
                if crashed:
                    return WorkerCrashError("the process that decoded it died")
                crashed = True
            except (errors.NodeDiedError, errors.ObjectLostError):
                pass
            except errors.RayError as error:
                raise UserError(f"Ray gave up: {_first_line(error)}", where=KEY, remedy=_AGAIN) from error
            job = self._submit(function, task, alone=crashed)
        raise UserError(f"{MAX_LOST_NODES} machines died under one task", where=KEY, remedy=_AGAIN)

    def _cpus_of_smallest_node(self) -> int:
        """CPUs that make a task alone on its machine, and that some machine surely has."""
        return max(1, min((int(node["Resources"]["CPU"]) for node in self._nodes()), default=1))

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    def _connect(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray asks for this line, or warns
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        address: str | None = self._address or os.environ.get("RAY_ADDRESS", "")
        joined = joined_here()
        if address and address != "auto":
            require_head(address, self._wait_s)
        elif address and joined:
            require_head(joined, self._wait_s)
        elif not address:
            address = None if joined and answers(joined, self._wait_s) else "local"
        try:
            if address != "local":
                self._ray.init(address=address, **settings)
            else:
                get_logger().info("no Ray cluster is here: one is started, with %d workers", self._started_workers)
                self._ray.init(
                    address="local", num_cpus=self._started_workers, include_dashboard=False, **settings
                )  # fmt: skip
        except (ConnectionError, OSError, RuntimeError, TimeoutError, ValueError) as error:
            raise UserError(
                f'there is no Ray cluster at "{address or joined}": {_first_line(error)}', where=KEY,
                remedy="start it with `ray start --head`, and join it from this machine, which must be one of its own, "
                "with `ray start --address=HOST:PORT`; Python and Ray must be of one version everywhere; if it asks "
                "for a token, set RAY_AUTH_MODE=token",
            ) from error  # fmt: skip

    def _checked(self) -> RayPool:
        """Asks every machine what it has and compares it with this one."""
        nodes = {str(node["NodeID"]): str(node["NodeManagerAddress"]) for node in self._nodes()}
        if not nodes:
            raise UserError("the Ray cluster has no CPUs", where=KEY, remedy="add machines with `ray start --address=`")
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        jobs = {}
        for node, host in nodes.items():
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": 2, "scheduling_strategy": place}
            jobs[self._ray.remote(**options)(facts_here).remote(self._visible)] = host
        done, late = self._ray.wait(list(jobs), num_returns=len(jobs), timeout=60.0)
        found = {f"{jobs[job]} (machine {i})": self._facts(job) for i, job in enumerate(done)}
        here = facts_here(self._visible)
        self._here = (self._here[0], here)
        faults = unfit_nodes(here, {name: facts for name, facts in found.items() if facts is not None})
        faults += [f"{jobs[job]} did not answer within 60 s" for job in late]
        if faults:
            raise unfit(faults)
        return self

    def _facts(self, job: Any) -> NodeFacts | None:
        """What one machine has; None if it is gone."""
        try:
            facts: NodeFacts = self._ray.get(job)
            return facts
        except self._ray.exceptions.RayTaskError as error:
            return NodeFacts(error=_last_line(error))
        except (self._ray.exceptions.NodeDiedError, self._ray.exceptions.TaskUnschedulableError):
            return None

    def _disconnect(self) -> None:
        with _own_signals():
            self._ray.shutdown()
        self._connected_here = False
        self._remote.clear()


_AGAIN = "look at `ray status` and run the same command again: it goes on where it stopped"


def _work(
    here: tuple[str, NodeFacts], visible: Sequence[str], function: Callable[[Task], Result], task: Task
) -> Result:
    """Runs in a worker of the cluster: in the folder where Ray was started, on a machine that may just have joined."""
    folder, expected = here
    faults = unfit_nodes(expected, {platform.node(): _facts_once(tuple(visible))})
    if faults:
        raise unfit(faults)
    with contextlib.suppress(OSError):  # paths that are not relative do not need it
        os.chdir(folder)
    limit_threads()
    return function(task)


@functools.cache
def _facts_once(paths: tuple[str, ...]) -> NodeFacts:
    return facts_here(paths)


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            "Ray is not installed", where="executor=ray",
            remedy="pip install contentv[curation], or use executor=local",
        ) from error  # fmt: skip


def _cause(error: Any) -> BaseException:
    """What the function raised, or why it could not be called."""
    cause = getattr(error, "cause", None)
    by_name = type(cause).__name__ == "RaySystemError" and "No module named" in str(cause)  # the function, or its task
    if by_name or "failed to import on the worker" in str(error):
        return UserError(
            f"a machine of the Ray cluster cannot import contentv: {_last_line(error)}", where=KEY,
            remedy="install the same contentv on all of them, `pip install contentv[curation]`",
        )  # fmt: skip
    return cause if isinstance(cause, BaseException) else error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:300]


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps this program's handlers: Ray puts its own in their place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
