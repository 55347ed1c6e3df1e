"""A real Ray cluster of two machines (two of its node processes here): results, deaths of workers and of machines."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_tasks
import numpy as np
import pytest
from cluster_tasks import dies_once, flow_of, logged, place_of, refuses
from crashing import square_unless_three
from curation_process import curate_folder, tree
from toy_media import make_world, put

from contentv.base.errors import UserError
from contentv.curation.ray_node import NodeFacts, unfit_nodes
from contentv.curation.ray_pool import RayPool
from contentv.curation.workers import Pool, WorkerCrashError, WorkerPool

pytestmark = pytest.mark.dist
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="the extra `curation` is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # By this the workers find the tests' own tasks; a machine that is added gets the environment of its time.
        patch.setenv("PYTHONPATH", str(Path(cluster_tasks.__file__).parent))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}  # until a machine counts as dead
        head = {**SMALL, "include_dashboard": False, "_system_config": quick}
        found = Cluster(initialize_head=True, head_node_args=head)
        found.add_node(**SMALL)
        yield found
        found.shutdown()


@pytest.fixture
def pool(cluster: Any) -> Iterator[RayPool]:
    with RayPool(cluster.address) as opened:
        yield opened


def test_without_a_cluster_ray_is_started_here_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # names of sockets are short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")  # left by a cluster that was killed
        with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"), RayPool("auto"):
            pass
        with RayPool("", workers=1) as pool:
            assert pool.workers == 1
            assert [result for _, result in pool.map(abs, [-1, -2])] == [1, 2]
        assert not ray.is_initialized()


def test_it_is_a_pool_and_leaves_the_signals_alone(cluster: Any) -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with RayPool(cluster.address, visible=[str(Path.cwd()), "s3://bucket/videos"]) as pool:
            assert isinstance(pool, Pool)
            assert pool.workers == 2
            assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_tasks_run_on_both_machines_in_this_folder_with_one_thread(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with RayPool(cluster.address) as pool:
        found = list(pool.map(place_of, range(8)))
    assert [task for task, _ in found] == [result[0] for _, result in found] == list(range(8))  # type: ignore[index]
    assert len({result[1] for _, result in found}) == 2  # type: ignore[index]
    assert {result[2:] for _, result in found} == {(str(tmp_path), 1)}  # type: ignore[index]


def test_results_are_those_of_local_processes(pool: RayPool) -> None:
    with WorkerPool(2) as local:
        expected = [flow for _, flow in local.map(flow_of, range(5))]
    found = [flow for _, flow in pool.map(flow_of, range(5))]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(flow.flags.writeable for flow in found)  # type: ignore[union-attr]


def test_maps_feed_each_other_and_tasks_are_drawn_as_needed(pool: RayPool) -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(10, 40):
            drawn.append(number)
            yield number

    squares = (result for _, result in pool.map(square_unless_three, numbers()))
    outer = pool.map(square_unless_three, squares)
    task, result = next(outer)
    assert (task, result) == (100, 10_000)
    assert len(drawn) <= 2 * 2 * pool.workers
    rest = [result for _, result in outer]
    assert [result, *rest] == [n**4 for n in range(10, 40)]


def test_a_curation_on_the_cluster_gives_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    for number in range(7):
        put(tmp_path / "in" / f"w{number}.mp4", make_world(number), f"world {number}")
    put(tmp_path / "in" / "text.mp4", b"no video" * 99, "a text")
    curate_folder(tmp_path / "in", tmp_path / "local")
    report = curate_folder(tmp_path / "in", tmp_path / "ray", executor="ray", ray_address=cluster.address)
    assert (report.workers, report.rejected) == (2, 1)
    assert len(tree(tmp_path / "ray")) > 5
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")


def test_a_map_may_be_left_early(pool: RayPool) -> None:
    left = pool.map(place_of, range(100))
    assert next(left)[0] == 0
    left.close()  # type: ignore[attr-defined]
    assert [result for _, result in pool.map(square_unless_three, [5])] == [25]


def test_a_deadly_task_costs_itself_alone_and_says_so_as_local_processes_do(pool: RayPool, tmp_path: Path) -> None:
    found = list(pool.map(square_unless_three, range(6)))
    assert [result for task, result in found if task != 3] == [0, 1, 4, 16, 25]
    error = found[3][1]
    assert isinstance(error, WorkerCrashError)
    with WorkerPool(2) as local:
        (ours,) = [result for task, result in local.map(square_unless_three, [3])]
    assert str(error) == str(ours)


def test_a_task_whose_process_died_is_done_again(pool: RayPool, tmp_path: Path) -> None:
    assert list(pool.map(dies_once, [str(tmp_path / "mark")])) == [(str(tmp_path / "mark"), "done")]


def test_what_a_task_raises_is_raised_here(pool: RayPool) -> None:
    with pytest.raises(UserError, match="7 is too many") as caught:
        list(pool.map(refuses, [7]))
    assert (type(caught.value), caught.value.where, caught.value.remedy) == (UserError, "here", "take fewer")


def killed_at_work(cluster: Any, machine: Any, begun: list[Path]) -> bool:
    """Kills the machine if one of its tasks is at work, and says whether it did."""
    for path in begun:
        words = path.read_text().split() if path.exists() else []  # none yet: it is there before it is written
        if not words or words[-2] != machine.node_id or path.with_suffix(".done").exists():
            continue
        process = int(words[-1])
        os.kill(process, signal.SIGSTOP)  # its workers die with a machine; here they would go on for a moment
        if path.with_suffix(".done").exists():  # it came to its end before it was stopped
            os.kill(process, signal.SIGCONT)
            continue
        cluster.remove_node(machine, allow_graceful=False)
        os.kill(process, signal.SIGKILL)
        return True
    return False


def test_the_work_of_a_machine_that_dies_is_done_elsewhere(cluster: Any, tmp_path: Path) -> None:
    third = cluster.add_node(**SMALL)
    tasks = [(str(tmp_path), number) for number in range(14)]
    begun = {number: tmp_path / f"{number}.begun" for number in range(14)}
    with RayPool(cluster.address) as pool:
        assert pool.workers == 3
        results = []
        for task, result in pool.map(logged, tasks):
            results.append((task, result))
            if third is not None and killed_at_work(cluster, third, list(begun.values())):
                third = None
    assert third is None
    assert results == [(task, 10 * task[1]) for task in tasks]
    nodes = {n: [line.split()[0] for line in path.read_text().splitlines()] for n, path in begun.items()}
    again = [found for found in nodes.values() if len(found) > 1]
    assert len(again) == 1, "the machine died with one task at work"
    assert again[0][0] != again[0][1]


def test_a_task_that_the_machines_cannot_import_is_explained(
    pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def same(number):\n    return number\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    with pytest.raises(UserError, match="No module named 'only_here'"):
        list(pool.map(only_here.same, [1]))


def test_a_path_that_a_machine_does_not_see_is_named(cluster: Any, tmp_path: Path) -> None:
    missing = tmp_path / "elsewhere"
    with pytest.raises(UserError, match=r"does not see .*elsewhere"), RayPool(cluster.address, visible=[str(missing)]):
        pass
    with RayPool(cluster.address) as pool:  # it let go of the cluster
        assert pool.workers == 2


def test_a_machine_that_stops_seeing_the_files_is_named(cluster: Any, tmp_path: Path) -> None:
    """It stands for one that joins later: what it has is checked where the work is done."""
    (tmp_path / "share").mkdir()
    with RayPool(cluster.address, visible=[str(tmp_path / "share")]) as pool:
        (tmp_path / "share").rmdir()
        with pytest.raises(UserError, match=r"does not see .*share"):
            list(pool.map(square_unless_three, [1]))


def test_machines_unlike_this_one_are_named() -> None:
    here = NodeFacts({"contentv": "1 (a)", "opencv": "5"})
    found = {
        "a": here,
        "b": NodeFacts({"contentv": "1 (b)", "opencv": "5"}, missing=("/x",)),
        "c": NodeFacts(error="No module named 'contentv'"),
    }
    assert unfit_nodes(here, found) == [
        "b has contentv 1 (b), not 1 (a)", "b does not see /x", "c cannot import contentv (No module named 'contentv')",
    ]  # fmt: skip


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"contentv\[curation\]"):
        RayPool()


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_where_no_cluster_answers_is_refused_at_once(listens: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen(1)  # and never says a word
        started = time.monotonic()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster answers at {address}"), RayPool(address, wait_s=1.0):
            pass
        assert time.monotonic() - started < 30  # Ray's own attempt takes five minutes


@pytest.mark.parametrize("address", ["somewhere", "ray://head:10001", "head:"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"), RayPool(address):
        pass


def test_another_server_is_not_taken_for_a_cluster() -> None:
    from threading import Thread

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(64)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match="not Ray"), RayPool(f"127.0.0.1:{server.getsockname()[1]}"):
            pass
        thread.join()
