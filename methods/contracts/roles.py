"""Roles of what a learner holds: what merges of models take a mean of, and what they leave alone.

Parameters are weights. Of the buffers those with integers or booleans are counters and all others
statistics, unless the module that holds them says something else in `learned_buffers` or
`counting_buffers`.
"""

from typing import Literal

from torch import nn

Role = Literal["weight", "statistic", "counter"]
"""`weight`: set by training, and what a merge is about. `statistic`: measured on images, such as
class means; a mean of models is one of their statistics, too. `counter`: numbers, choices and
clusters in an order of their own, of which a mean says nothing."""


def roles(learner: nn.Module) -> dict[str, Role]:
    """Role of every tensor of a learner's state, by name.

    Raises:
        ValueError: a module names a buffer that it does not have.
    """
    found: dict[str, Role] = {name: "weight" for name, _ in learner.named_parameters()}
    for place, module in learner.named_modules():
        own = dict(module.named_buffers(recurse=False))
        learned = getattr(module, "learned_buffers", ())
        counting = getattr(module, "counting_buffers", ())
        if strangers := {*learned, *counting} - own.keys():
            raise ValueError(f"{type(module).__name__} has no buffer {min(strangers)}")
        for name, buffer in own.items():
            counts = name in counting or not buffer.is_floating_point()
            role: Role = "counter" if counts else "weight" if name in learned else "statistic"
            found[f"{place}.{name}".lstrip(".")] = role
    return found
