"""The command `graftwork`."""

import faulthandler
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Literal

import typer
from rich.console import Console

from graftwork import __version__
from graftwork.operators.errors import ConfigError, Interrupted
from graftwork.pipelines.commands.ending import fail, ready, terminating
from graftwork.pipelines.commands.options import (
    DEFAULT_STORE,
    Address,
    AsJson,
    Insecure,
    Job,
    JobAddress,
    Overrides,
    Spec,
    StoreUrl,
    Tracking,
    existing,
    place,
    print_json,
    recorded,
)
from graftwork.pipelines.commands.split import split

app = typer.Typer(
    name="graftwork",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Continual learning with pre-trained models, as a pipeline on Ray.\n\n"
    "Start with [bold]graftwork run quickstart[/bold], then [bold]graftwork ui[/bold].",
    epilog="--debug, anywhere, shows the traceback of an error.",
)
cache_app = typer.Typer(no_args_is_help=True, help="Look at the store, check it, tidy it.")
app.add_typer(cache_app, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"graftwork {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    del version  # typer calls `_version` before any command


@app.command(epilog="Example: graftwork run quickstart --set 'seeds=[0,1]' --store /data/store")
def run(
    spec: Spec,
    overrides: Overrides = None,
    store: StoreUrl = DEFAULT_STORE,
    tracking: Tracking = None,
    address: Address = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline: compute what the store lacks, record everything, print the results."""
    from graftwork.pipelines.reporting import terminal
    from graftwork.pipelines.running.progress import Display
    from graftwork.pipelines.running.run import run_pipeline
    from graftwork.pipelines.spec.loading import load_resolved

    loaded = load_resolved(spec, overrides or ())
    document = run_pipeline(loaded, place(store, tracking, address, insecure), Display())
    if as_json:
        print_json(document.to_json())
    else:
        terminal.document(document, Console())


@app.command(epilog="Example: graftwork plan cifar100-small --set scenario.increment=20")
def plan(
    spec: Spec,
    overrides: Overrides = None,
    store: StoreUrl = DEFAULT_STORE,
    mermaid: Annotated[
        bool, typer.Option("--mermaid", help="Print the graph in Mermaid's language.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the graph of a pipeline: what is stored, what is not, and why it is not."""
    from graftwork.operators.store import Store
    from graftwork.pipelines.explaining import explain, sealed
    from graftwork.pipelines.planning import sources
    from graftwork.pipelines.planning.plan import make_plan
    from graftwork.pipelines.reporting import terminal
    from graftwork.pipelines.spec.loading import load_resolved

    loaded = load_resolved(spec, overrides or ())
    opened = Store(place(store, None).store).for_looking()
    made = make_plan(loaded, opened.memo)
    sources.seal(made.sources, made.stages, opened.memo)
    for line in sources.remarks(made.sources):
        typer.echo(line, err=True)
    if mermaid:
        print(explain.mermaid(made, opened))
        return
    status = explain.explain(made, opened)
    if as_json:
        print_json(asdict(status))
    else:
        terminal.plan(status, Console())
    with loaded.locating():
        sealed.refuse(status.gone)


@app.command(epilog="Example: graftwork doctor spec.yaml")
def doctor(
    spec: Spec,
    overrides: Overrides = None,
    store: StoreUrl = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Look at the data of a spec before any cluster time: counts, sizes, broken images."""
    from graftwork.operators.store import Store
    from graftwork.pipelines.commands.doctor import doctor as inspect
    from graftwork.pipelines.running.progress import Display
    from graftwork.pipelines.spec.loading import load_resolved

    loaded = load_resolved(spec, overrides or ())
    inspect(loaded, Store(place(store, None).store).for_looking(), Display(), as_json)


app.command(epilog="Example: graftwork split spec.yaml -o split.csv")(split)


@app.command(
    epilog="Example: graftwork submit spec.yaml --address http://HEAD:8265 --store s3://b/s"
)
def submit(
    spec: Spec,
    address: JobAddress,
    overrides: Overrides = None,
    store: StoreUrl = DEFAULT_STORE,
    tracking: Tracking = None,
    insecure: Insecure = False,
) -> None:
    """Run a pipeline as a job of a Ray cluster; prints the job's id."""
    from graftwork.cluster import jobs
    from graftwork.pipelines.spec.loading import load_resolved, with_absolute_places

    loaded = load_resolved(spec, overrides or ())
    where = place(store, tracking)
    print(
        jobs.submit(
            spec,
            address=address,
            spec_text=with_absolute_places(loaded),
            store=where.store,
            tracking=where.tracking_uri(),
            insecure=insecure,
        )
    )


@app.command(epilog="Example: graftwork status graftwork-x1 --address http://HEAD:8265")
def status(job: Job, address: JobAddress, as_json: AsJson = False) -> None:
    """State, times and message of a submitted job."""
    from graftwork.cluster import jobs
    from graftwork.pipelines.reporting import terminal

    terminal.job(jobs.status(job, address=address), Console(), as_json)


@app.command(epilog="Example: graftwork logs graftwork-x1 --follow --address http://HEAD:8265")
def logs(
    job: Job,
    address: JobAddress,
    follow: Annotated[bool, typer.Option(help="Keep printing until the job ends.")] = False,
) -> None:
    """Print what a submitted job printed."""
    from graftwork.cluster import jobs

    for piece in jobs.logs(job, address=address, follow=follow):
        print(piece, end="", flush=True)


@app.command(epilog="Example: graftwork stop graftwork-x1 --address http://HEAD:8265")
def stop(job: Job, address: JobAddress, as_json: AsJson = False) -> None:
    """Stop a submitted job; what it stored is kept."""
    from graftwork.cluster import jobs
    from graftwork.pipelines.reporting import terminal

    terminal.job(jobs.stop(job, address=address), Console(), as_json)


@app.command(epilog="Example: graftwork results --pipeline quickstart --format md")
def results(
    pipeline: Annotated[str | None, typer.Option(help="Only this pipeline.")] = None,
    format: Annotated[
        Literal["table", "json", "csv", "md"], typer.Option(help="How to print it.")
    ] = "table",
    store: StoreUrl = DEFAULT_STORE,
    tracking: Tracking = None,
) -> None:
    """The leaderboard: mean and deviation over class orders and seeds, from MLflow."""
    from graftwork.pipelines.reporting import leaderboard as leaderboards

    where = recorded(store, tracking)
    rows = leaderboards.leaderboard(where.tracking_uri(), pipeline)
    print(leaderboards.render(rows, format).rstrip("\n"))


@app.command(
    epilog="Example: graftwork predict quickstart/slda photos/ more/*.png --top 3  "
    "Example: graftwork predict RUN_ID s3://bucket/images.parquet --output predictions.parquet"
)
def predict(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="MLflow's id of a method's run, or PIPELINE/METHOD for its newest one.",
        ),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Image files, folders (at any depth), globs, Parquet files, or URLs of them.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes named per image.")] = 1,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write them to a .parquet or .csv file instead."),
    ] = None,
    image_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of the images in Parquet files.")
    ] = "image",
    on_bad_image: Annotated[
        Literal["error", "skip"], typer.Option(help="What to do about images that are unusable.")
    ] = "error",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")
    ] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            envvar="GRAFTWORK_WEIGHTS",
            metavar="FILE",
            help="The backbone's weights, if they are not where they were; FILE,FILE for two.",
        ),
    ] = None,
    store: StoreUrl = DEFAULT_STORE,
    tracking: Tracking = None,
    address: Address = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Use a result: what the model of a finished run says of images.

    Scores are the method's own logits: larger is likelier, but they are no probabilities.
    """
    from graftwork.pipelines.commands import predict as predicting
    from graftwork.pipelines.running.progress import Display

    where = recorded(store, tracking, address, insecure)
    request = predicting.Request(
        run=run,
        words=images,
        column=image_column,
        top=top,
        on_bad_image=on_bad_image,
        device=device,
        weights=weights,
    )
    predicting.predictions(request, where, Display(), Console(), output, as_json)


@app.command(epilog="Example: graftwork methods ranpac")
def methods(
    name: Annotated[str | None, typer.Argument(help="Fields and card of one method.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or the hyper-parameters and the card of one."""
    from graftwork.pipelines.reporting import terminal

    terminal.methods(name, Console(), as_json)


@app.command(epilog="Example: graftwork ui --port 5001")
def ui(
    store: StoreUrl = DEFAULT_STORE,
    tracking: Tracking = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Serve MLflow's pages on this machine (127.0.0.1 only) until Ctrl-C."""
    from graftwork.pipelines.commands.ui import serve

    where = recorded(store, tracking)
    serve(where.tracking_uri(), port)


@cache_app.command("ls", epilog="Example: graftwork cache ls --store /data/store")
def cache_ls(store: StoreUrl = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Count what the store holds, by kind of stage."""
    from graftwork.operators import housekeeping
    from graftwork.pipelines.reporting import terminal

    rows = housekeeping.inventory(existing(store))
    print_json(rows) if as_json else terminal.inventory(rows, Console())


@cache_app.command("verify", epilog="Example: graftwork cache verify --repair")
def cache_verify(
    store: StoreUrl = DEFAULT_STORE,
    repair: Annotated[bool, typer.Option("--repair", help="Set damaged stages aside.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every stored byte and compare it with its manifest; exit status 6 when damaged."""
    from graftwork.operators import housekeeping
    from graftwork.pipelines.reporting import terminal

    found = housekeeping.verify(existing(store), repair)
    print_json(found) if as_json else terminal.verified(found, Console())
    raise typer.Exit(6 if found["damaged"] else 0)


@cache_app.command("gc", epilog="Example: graftwork cache gc --unused --delete")
def cache_gc(
    store: StoreUrl = DEFAULT_STORE,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete; without it, only list.")
    ] = False,
    unused: Annotated[
        bool, typer.Option("--unused", help="Also stages that no run record names.")
    ] = False,
    days: Annotated[float, typer.Option(min=0, help="Only what is older.")] = 7.0,
    force: Annotated[bool, typer.Option("--force", help="Allow --days below 7.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find (and with --delete remove) what crashes left behind and what was set aside."""
    from graftwork.operators import housekeeping
    from graftwork.pipelines.reporting import terminal

    if days < 7 and not force:
        raise ConfigError(f"--days {days:g} would touch files of running pipelines; add --force")
    found = housekeeping.collect(existing(store), days, unused, delete)
    print_json(found) if as_json else terminal.collected(found, Console())


def main() -> None:
    """Entry point: errors become one line each on stderr and an exit status."""
    # A crash in a library leaves at least the place where it was; Ray would turn this on, too, but
    # only once it runs. The caller may have done so already.
    if not faulthandler.is_enabled() and sys.stderr is not None:
        with suppress(OSError, ValueError):  # standard error is no file
            faulthandler.enable()
    ready()
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        with terminating():
            sys.exit(_invoke(arguments))
    except SystemExit as ended:
        # rich's answer to a closed pipe is status 1.
        sys.exit(0 if isinstance(ended.__context__, BrokenPipeError) else ended.code)
    except BrokenPipeError:
        # The reader (`head`) went away; Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        fail(Interrupted(signal.SIGINT), debug)
    except Exception as error:
        fail(error, debug)


def _invoke(arguments: list[str]) -> int:
    """The command's exit status. Not by calling `app`, which draws a box around every error."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("graftwork", arguments) as context:
            command.invoke(context)
        status = 0
    except typer.Exit as ended:
        status = ended.exit_code
    # A closed pipe is noticed here, where it can still be handled.
    sys.stdout.flush()
    return status
