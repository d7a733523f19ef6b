"""States of models as stages store them: tensors in safetensors."""

from functools import lru_cache

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graftwork.methods.contracts.card import State
from graftwork.operators.store import Store


# An evaluation reads the state of one task after another.
@lru_cache(maxsize=1)
def load_states(store: Store, operator: str, key: str) -> list[State]:
    """The states of a stored fit, one per task.

    Raises:
        DamagedStage: the stored file is damaged.
    """
    tensors = load_tensors(store.read(operator, key, "state.safetensors"))
    states: list[State] = []
    for name in sorted(tensors, key=lambda n: int(n.partition("/")[0])):
        number, _, short = name.partition("/")
        if int(number) == len(states):
            states.append({})
        # In memory of its own: BLAS may sum in another order where an operand is not aligned.
        states[int(number)][short] = tensors[name].clone()
    return states


def load_state(store: Store, operator: str, key: str) -> State:
    """Content that is stored of a task.

    Raises:
        DamagedStage: it is damaged.
    """
    return load_tensors(store.read(operator, key, "state.safetensors"))


def files_of(state: State) -> dict[str, bytes]:
    """A state as it is stored."""
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    return {"state.safetensors": save_tensors(on_cpu)}


def bytes_of(state: State) -> int:
    """Description of what the tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
