"""The command that writes down which images each task of a stream has."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from graftwork.pipelines.commands.options import DEFAULT_STORE, Overrides, Spec, StoreUrl, place

File = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where to write it: comma-separated values, or Parquet if it ends in .parquet.",
    ),
]


def split(
    spec: Spec,
    output: File,
    overrides: Overrides = None,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Write which images each task of a stream has, for scenario.manifest to follow anywhere."""
    from graftwork.operators.store import Store
    from graftwork.operators.streams import manifest
    from graftwork.pipelines.planning.plan import pieces_of
    from graftwork.pipelines.reporting import terminal
    from graftwork.pipelines.spec.loading import load_resolved

    loaded = load_resolved(spec, overrides or ())
    order, pieces = pieces_of(loaded, Store(place(store, None).store).for_looking().memo)
    data = manifest.write(pieces, str(order), parquet=output.suffix == ".parquet")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
    terminal.pieces(pieces, str(output), Console())
