"""The leaderboard: numbers by hand, every format, and each result counted once."""

import csv
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.operators.errors import ConfigError
from graftwork.operators.tracking.sender import connect
from graftwork.operators.tracking.tracker import MethodRun, Tracker
from graftwork.operators.tracking.uri import default_uri
from graftwork.pipelines.commands import ui
from graftwork.pipelines.reporting.leaderboard import Record, aggregate, labels, leaderboard, render


def record(method: str, order: int, seed: int, a_avg: float, **parameters: str) -> Record:
    shared = {"method": method, "order": str(order), "seed": str(seed)} | parameters
    metrics = {"a_avg": a_avg, "a_last": a_avg - 10, "forgetting": 3.0, "bwt": -3.0}
    return Record(pipeline="p|1", parameters=shared, metrics=metrics | {"seconds": 2.0})


RECORDS = [
    record("ranpac", 1, 0, 80.0, dim="10"),
    record("ranpac", 1, 1, 82.0, dim="10"),
    record("ranpac", 2, 0, 90.0, dim="10"),
    record("ranpac", 2, 1, 88.0, dim="10"),
    record("ranpac", 1, 0, 70.0, dim="5"),
    record("simplecil", 1, 0, 86.0),
]


def test_numbers_by_hand() -> None:
    rows = aggregate(RECORDS)
    assert [row.name for row in rows] == ["simplecil", "ranpac (dim=10)", "ranpac (dim=5)"]
    ranpac = rows[1]
    assert (ranpac.runs, ranpac.orders, ranpac.seeds) == (4, 2, 2)
    assert (ranpac.mean["a_avg"], ranpac.mean["a_last"]) == (85.0, 75.0)
    # Deviations -5, -3, 5, 3: (25 + 9 + 25 + 9) / 3 = 68 / 3.
    assert ranpac.std["a_avg"] == pytest.approx((68 / 3) ** 0.5)
    assert (ranpac.best_order, ranpac.worst_order) == (("2", 89.0), ("1", 81.0))
    assert rows[0].std["a_avg"] is None
    assert ranpac.hyperparameters == {"dim": "10"}
    assert "task_a_avg" not in ranpac.mean


def test_names_say_what_differs() -> None:
    same = {"method": "m", "a": "1", "b": "2"}
    names = labels([("p", same), ("p", same | {"b": "3"}), ("q", same), ("p", {"method": "n"})])
    assert names == ["m (b=2)", "m (b=3)", "m", "n"]


def test_formats() -> None:
    rows = aggregate(RECORDS)
    values = json.loads(render(rows, "json"))
    assert values[1]["mean"]["a_avg"] == 85.0 and values[0]["std"]["a_avg"] is None
    table = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert float(table[1]["a_avg_std"]) == rows[1].std["a_avg"]
    assert table[0]["a_avg_std"] == "" and json.loads(table[1]["hyperparameters"]) == {"dim": "10"}
    lines = render(rows, "md").splitlines()
    assert lines[0].startswith("| pipeline | method | runs | A_avg |")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    text = render(rows, "table")
    assert "ranpac (dim=10)" in text and "85.00 ± 4.76" in text and "\x1b" not in text
    with pytest.raises(ConfigError, match="unknown format 'xml'; have: table, json, csv, md"):
        render(rows, "xml")  # type: ignore[arg-type]
    assert render([], "json") == "[]" and render([], "table")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two runs of a pipeline, the second served from the store, and a failed one of another."""
    folder = tmp_path_factory.mktemp("store")
    # Tables that another module may have made already: making them takes seconds.
    template = tmp_path_factory.getbasetemp() / "mlflow-template.db"
    if not template.exists():
        connect(f"sqlite:///{template}").search_experiments()
    for part in template.parent.glob(f"{template.name}*"):
        shutil.copy(part, folder / part.name.replace(template.name, "mlflow.db"))
    uri = default_uri(folder)
    for cached in (False, True):
        tracker = Tracker(uri, "cifar100-small", folder / "journal")
        tracker.start("run", {}, {}, {})
        for order in (1, 2):
            run = MethodRun(
                key=f"key{order}",
                name=f"ranpac {order}",
                params={"method": "ranpac", "order": order, "seed": 0, "dim": 10},
                metrics={"a_avg": 80.0 + order, "a_last": 70.0, "forgetting": 1.0, "bwt": -1.0},
                cached=cached,
            )
            tracker.method_run(run)
        assert tracker.finish("FINISHED").unsent == 0
    return uri


def test_a_cached_result_counts_once(uri: str) -> None:
    (row,) = leaderboard(uri)
    assert (row.pipeline, row.name, row.runs, row.mean["a_avg"]) == (
        "cifar100-small",
        "ranpac",
        2,
        81.5,
    )
    assert leaderboard(uri, "cifar100-small") == [row]


def test_an_unknown_pipeline_is_named_with_its_neighbour(uri: str) -> None:
    message = r"unknown pipeline 'cifar10-small'; did you mean 'cifar100-small'\? have: cifar100-"
    with pytest.raises(ConfigError, match=message):
        leaderboard(uri, "cifar10-small")


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing recorded in .*mlflow\.db yet"):
        leaderboard(default_uri(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_user_interface_refuses_a_busy_port_and_listens_here_only(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used .*another --port"):
            ui.serve(default_uri(tmp_path), port)
    with pytest.raises(ConfigError, match="port must be in"):
        ui.serve(default_uri(tmp_path), 0)
    command = ui.command(5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    secret = ui.environment("postgresql://u:hunter2@h/d")
    assert secret["MLFLOW_BACKEND_STORE_URI"] == "postgresql://u:hunter2@h/d"
    assert not any("hunter2" in part for part in command)


def test_the_user_interface_from_start_to_ctrl_c(uri: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As from a terminal: what is started in the background of a shell ignores Ctrl-C.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from graftwork.pipelines.commands.ui import serve; "
        "sys.exit(serve(sys.argv[1], int(sys.argv[2])))"
    )
    command = [sys.executable, "-u", "-c", code, uri, str(port)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as shown:
        assert shown.stdout is not None
        line = shown.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/") and line.endswith("; Ctrl-C ends it\n")
        # 0100007F is 127.0.0.1, 0A the state of listening.
        table = [x.split() for x in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        table += [x.split() for x in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
        listening = [x[1] for x in table if x[3] == "0A" and x[1].endswith(f":{port:04X}")]
        assert listening == [f"0100007F:{port:04X}"]
        shown.send_signal(signal.SIGINT)
        out, err = shown.communicate(timeout=30)
    assert (shown.returncode, out, err) == (0, "", "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()


def test_a_server_that_is_there_is_only_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui.tracking_uri, "check", lambda uri: None)
    said: list[str] = []
    assert ui.serve("http://u:hunter2@h:5000", 5000, announce=said.append) == 0
    assert said == ["MLflow is already served at http://***@h:5000"]
