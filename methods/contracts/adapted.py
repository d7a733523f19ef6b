"""The contract of adapted methods: train on the first task, then fit on the adapted features.

Shapes: N rows, D width of the backbone's features.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.trained import Trained


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts that an adapted method consists of.

    Args:
        first_session: trains on the first task; None adapts nothing, and the features are the
            frozen backbone's.
        classifier: the closed-form method that is fitted on the features, a key of `METHODS` with
            its hyper-parameters; None if the method itself is the `Fitted`.
        keeps_frozen: rows [N, 2 D] are the features of the frozen backbone and then those of the
            adapted one, neither normalised; otherwise the adapted ones [N, D] alone.

    Example:
        >>> parts = graftwork.Parts(
        ...     first_session=build("first_session", {"peft": "ssf"}),
        ...     classifier=("simplecil", {}),
        ...     keeps_frozen=True,
        ... )
        >>> parts == build("aper_ssf", {}).parts()
        True
    """

    first_session: Trained | None
    classifier: tuple[str, dict[str, Any]] | None
    keeps_frozen: bool


class Adapted(Protocol):
    """A method in two parts; a frozen keyword-only dataclass.

    Example:
        >>> method: graftwork.Adapted = build("aper_ssf", {"epochs": 3})
        >>> method.parts().first_session.epochs
        3
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    card: ClassVar[Card]

    def parts(self) -> Parts:
        """The parts, as the hyper-parameters have them."""
        ...
