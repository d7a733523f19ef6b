"""Options that several commands share, and what they stand for."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork.operators.errors import ConfigError

if TYPE_CHECKING:
    from graftwork.operators.store import Store
    from graftwork.pipelines.running.where import Where

Spec = Annotated[
    str, typer.Argument(metavar="SPEC", help="A YAML file, an fsspec URL, or a preset's name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value: --set backbone.precision=bf16."
    ),
]
StoreUrl = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="GRAFTWORK_STORE",
        metavar="URL",
        help="Where features and results are kept: a folder or an fsspec URL.",
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option(
        envvar="MLFLOW_TRACKING_URI",
        metavar="URI",
        help="MLflow's tracking URI; default: a database in the store's folder.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(metavar="RAY", help="A Ray cluster to join (host:port, ray://...); default: own."),
]
JobAddress = Annotated[
    str, typer.Option("--address", metavar="URL", help="The cluster's dashboard: http://HEAD:8265.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow a cluster that asks for no token.")
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` printed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DEFAULT_STORE = "graftwork-store"


def place(
    store: str, tracking: str | None, address: str | None = None, insecure: bool = False
) -> "Where":
    """Places where a run keeps its results and computes.

    Raises:
        ConfigError: the store is no place that can be written.
    """
    from graftwork.operators.files import urls
    from graftwork.pipelines.running.where import Where

    try:
        urls.check(store)
    except ConfigError as error:
        raise error.about("--store") from error
    if store.startswith("hf://"):
        raise ConfigError('protocol "hf" can only be read (file, s3, gs, abfs)', key="--store")
    return Where(store=store, tracking=tracking, address=address, insecure=insecure)


def recorded(
    store: str, tracking: str | None, address: str | None = None, insecure: bool = False
) -> "Where":
    """Place of earlier runs and their records, for commands that only look.

    Raises:
        ConfigError: the store is no place that can be used.
        StorageError: the records are in the store's folder, and there is none.
    """
    where = place(store, tracking, address, insecure)
    if not tracking:
        where.must_exist()
    return where


def existing(store: str) -> "Store":
    """The store of an earlier run: a mistyped name must not look like an empty store."""
    from graftwork.operators.store import Store

    return Store(recorded(store, None).store)


def print_json(value: Any) -> None:
    """Prints a document on stdout."""
    print(json.dumps(value, indent=1))
