"""Places where a run keeps its results and its records."""

from dataclasses import dataclass
from pathlib import Path

from graftwork.operators.errors import ConfigError, StorageError
from graftwork.operators.tracking import uri as tracking_uri
from graftwork.operators.tracking.journal import on_this_machine


@dataclass(frozen=True, kw_only=True)
class Where:
    """Places where a run keeps its results and computes.

    Args:
        store: local path or fsspec URL.
        tracking: MLflow's URI; None for a database in a local store's folder.
        address: Ray cluster to join; None for a local Ray.
        insecure: join a cluster on another machine although it asks for no token.
    """

    store: str
    tracking: str | None = None
    address: str | None = None
    insecure: bool = False

    def tracking_uri(self) -> str:
        """The URI to record at.

        Raises:
            ConfigError: a remote store needs one said.
        """
        if self.tracking:
            return self.tracking
        return tracking_uri.default_uri(self.folder("--tracking"))

    def folder(self, needed_for: str) -> Path:
        """The store's local folder.

        Raises:
            ConfigError: the store is remote.
        """
        if "://" in self.store and not self.store.startswith("file://"):
            raise ConfigError(f"store {self.store} is remote; pass {needed_for}")
        return Path(self.store.removeprefix("file://")).absolute()

    def must_exist(self) -> None:
        """Refuses a local store that does not exist, for commands that only look.

        Raises:
            StorageError: the store is local, and not there.
        """
        if "://" in self.store and not self.store.startswith("file://"):
            return
        folder = self.folder("")
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "not found"
            raise StorageError(f"--store: {folder}: {what}; name the store of an earlier run")

    def journal(self) -> Path:
        """Local folder for records on their way to MLflow."""
        if "://" in self.store and not self.store.startswith("file://"):
            return on_this_machine()
        return self.folder("") / "journal"
