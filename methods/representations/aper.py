"""APER: a backbone adapted on the first task, then class means of two backbones.

One class for each kind of adaptation: the values of the authors' configuration for it.
"""

from dataclasses import dataclass
from typing import ClassVar

from graftwork.methods.contracts.adapted import Parts
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.parts import first_session
from graftwork.methods.parts.epochs import Decayed, Epochs
from graftwork.methods.parts.prompt_tokens import PromptInit

PAPER = "https://arxiv.org/abs/2303.07338"


@dataclass(frozen=True, kw_only=True)
class Aper(Decayed, Epochs):
    """Adapts a backbone on the first task, then takes class means of both features; no method yet.

    Zhou et al., https://arxiv.org/abs/2303.07338 (APER, earlier ADAM), with the defaults of
    RevisitingCIL for CIFAR-100 in steps of five classes. Features of frozen and adapted backbone
    stand side by side, and SimpleCIL is fitted on them.

    Args:
        epochs: passes over the images of the first task.
        weight_decay: of everything that is trained, classifier included.
        optimizer: optimiser of the first task.
        schedule: learning rate over the epochs.
    """

    card: ClassVar[Card]
    kind: ClassVar[first_session.Peft]
    """What is trained."""

    batch_size: int = 48

    def __post_init__(self) -> None:
        require(self, first_session.rules(self))

    def parts(self) -> Parts:
        """The first session, and SimpleCIL on the features of both backbones."""
        session = first_session.of(self.kind, self)
        return Parts(first_session=session, classifier=("simplecil", {}), keeps_frozen=True)


@dataclass(frozen=True, kw_only=True)
class AperFinetune(Aper):
    """Fine-tunes a copy of the backbone on the first task; then class means of both features.

    APER, https://arxiv.org/abs/2303.07338.
    Shapes: C classes seen, D feature width.
    """

    card: ClassVar[Card] = Card(
        title="APER with fine-tuning",
        paper=PAPER,
        summary="Fine-tunes a copy of the backbone on the first task; class means of both.",
        memory="a second backbone; C * 2D floats",
        uses_seed=True,
        contract="adapted",
    )
    kind = "finetune"

    epochs: int = 5
    batch_size: int = 128


@dataclass(frozen=True, kw_only=True)
class AperVPTShallow(Aper):
    """Trains prompt tokens at the input on the first task; then class means of both features.

    APER, https://arxiv.org/abs/2303.07338.
    Shapes: C classes seen, D feature width, L prompt length.

    Args:
        prompt_length: L, prompt tokens, at the input.
        vpt_init: start of the prompts: uniform as VPT, zeros as the authors' code, where all stay
            equal.
    """

    card: ClassVar[Card] = Card(
        title="APER with VPT-shallow",
        paper=PAPER,
        summary="Trains prompts at the input on the first task; class means of both features.",
        memory="L * D floats of prompt; C * 2D floats",
        uses_seed=True,
        contract="adapted",
    )
    kind = "vpt_shallow"

    prompt_length: int = 5
    vpt_init: PromptInit = "uniform"


@dataclass(frozen=True, kw_only=True)
class AperVPTDeep(Aper):
    """Trains prompt tokens in every block on the first task; then class means of both features.

    APER, https://arxiv.org/abs/2303.07338.
    Shapes: C classes seen, D feature width, L prompt length.

    Args:
        prompt_length: L, prompt tokens, in every block.
        vpt_init: start of the prompts: uniform as VPT, zeros as the authors' code, where all stay
            equal.
    """

    card: ClassVar[Card] = Card(
        title="APER with VPT-deep",
        paper=PAPER,
        summary="Trains prompts in every block on the first task; class means of both features.",
        memory="blocks * L * D floats of prompt; C * 2D floats",
        uses_seed=True,
        contract="adapted",
    )
    kind = "vpt_deep"

    epochs: int = 5
    batch_size: int = 16
    lr: float = 0.05
    prompt_length: int = 5
    vpt_init: PromptInit = "uniform"


@dataclass(frozen=True, kw_only=True)
class AperSSF(Aper):
    """Trains scales and shifts on the first task; then class means of both features.

    APER, https://arxiv.org/abs/2303.07338.
    Shapes: C classes seen, D feature width.
    """

    card: ClassVar[Card] = Card(
        title="APER with SSF",
        paper=PAPER,
        summary="Trains scales and shifts on the first task; class means of both features.",
        memory="scales and shifts (2 * 134 D for 12 blocks); C * 2D floats",
        uses_seed=True,
        contract="adapted",
    )
    kind = "ssf"


@dataclass(frozen=True, kw_only=True)
class AperAdapter(Aper):
    """Trains adapters beside the MLPs on the first task; then class means of both features.

    APER, https://arxiv.org/abs/2303.07338.
    Shapes: C classes seen, D feature width, R bottleneck.

    Args:
        bottleneck: R, width of the adapters.
        dropout: of the adapters' hidden units.
    """

    card: ClassVar[Card] = Card(
        title="APER with adapters",
        paper=PAPER,
        summary="Trains adapters on the first task; class means of both features.",
        memory="adapters (2 R D + R + D floats per block); C * 2D floats",
        uses_seed=True,
        contract="adapted",
    )
    kind = "adapter"

    bottleneck: int = 64
    dropout: float = 0.1
