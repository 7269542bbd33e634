"""The reference's side of training: its own batches, its losses, gradients and steps, under the candidate's names.

Gradients are renamed and turned as `oracle.folder` renames and turns the parameters
they belong to; the candidate's name table has no part in it.
"""

import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jaxgpt.data.batches import Batch, permutation
from jaxgpt.settings import TrainSettings
from oracle import folder
from oracle.reference import to_numpy
from oracle.training_probe import Corpus
from torchref import Decoder, training

Arrays = dict[str, np.ndarray]


def micro_batches(corpus: Corpus, settings: TrainSettings) -> list[training.Batch]:
    """Of the documents, then of the episodes. The order of rows is the product's: no order is right or wrong."""
    T, B = settings.sequence_length, settings.batch_size

    def ordered(items: Sequence[Any]) -> list[Any]:
        return [items[i] for i in permutation(len(items), settings.seed, 0)]

    rows = training.windows(corpus.documents, T), training.packed(ordered(corpus.episodes), T)
    return [batch for some in rows for batch in training.batches(ordered(some), T, B)]


def as_product(batch: training.Batch) -> Batch:
    """A batch in the product's dtypes."""
    arrays = {name: tensor.numpy() for name, tensor in vars(batch).items()}
    wide: Any = {name: array.astype(np.float32 if name == "mask" else np.int32) for name, array in arrays.items()}
    return wide


def received(arrays: Mapping[str, Any]) -> training.Batch:
    """A batch of arrays, each (B, T), as the reference takes it."""
    tensors: Any = {name: torch.from_numpy(np.asarray(array).astype(np.int64)) for name, array in arrays.items()}
    return training.Batch(**tensors)


def recipe(settings: TrainSettings) -> training.Recipe:
    """The settings as the reference takes them."""
    names = {field.name for field in dataclasses.fields(training.Recipe)} - {"epsilon"}
    return training.Recipe(**{name: getattr(settings, name) for name in names})


def named(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """Parameters, gradients or anything of their shapes, as the candidate names and turns them."""
    return folder.parameters({name: to_numpy(tensor.detach()) for name, tensor in tensors.items()})


def token_losses(decoder: Decoder, batch: training.Batch) -> np.ndarray:
    """(B, T), in nats."""
    with torch.no_grad():
        return to_numpy(training.token_losses(decoder, batch))


def gradients(decoder: Decoder, batches: Sequence[training.Batch]) -> tuple[float, Arrays]:
    """Mean loss a trained token, and its gradient."""
    loss, found = training.gradients(decoder, batches)
    return loss, named(found)


def gradients_of(decoder: Decoder) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The reference in place of `jaxgpt.train_step.mean_gradients`, in the dtype of the model."""
    own = copy.deepcopy(decoder)
    # Views: what is written there the model computes with.
    places = named(dict(own.named_parameters()))

    def found(
        _config: Any, _settings: Any, _dtype: Any, state: Any, batches: Mapping[str, Any]
    ) -> tuple[float, Arrays]:
        for name, place in places.items():
            place[...] = np.asarray(state.params[name])
        stacked = {name: np.asarray(array) for name, array in batches.items()}
        count = len(stacked["ids"])
        return gradients(own, [received({n: array[i] for n, array in stacked.items()}) for i in range(count)])

    return found


def trainer(decoder: Decoder, settings: TrainSettings, dtype: torch.dtype) -> training.Trainer:
    """Trains a copy of the model in a dtype of its own."""
    return training.Trainer(copy.deepcopy(decoder).to(dtype), recipe(settings))


def part_of(decoder: Decoder, ids: int) -> Decoder:
    """A model of the first layer and the first ids, with copies of their parameters."""
    config: Any = decoder.config
    layers = "n_layer" if hasattr(config, "n_layer") else "num_hidden_layers"
    kind: Any = type(decoder)
    part: Decoder = kind(dataclasses.replace(config, vocab_size=ids, **{layers: 1})).to(decoder.dtype).eval()
    whole = decoder.state_dict()
    # Vocabulary comes first in an embedding and in a head; everything else has its own shape.
    kept = {name: whole[name][: tensor.shape[0]].clone() for name, tensor in part.state_dict().items()}
    part.load_state_dict(kept)
    return part


@dataclass(frozen=True)
class State:
    """A reference's parameters after a step, and what it said of the step."""

    parameters: Arrays
    divisors: Arrays
    """The smallest √v̂ + ε so far that Adam divided each element by, in float32."""
    report: training.Report


def steps(
    own: training.Trainer, groups: Sequence[Sequence[training.Batch]], count: int, kept: Container[int]
) -> Iterator[State]:
    """The state after each of `count` steps over the groups of micro-batches in turn, with arrays if it is `kept`."""
    divisors: dict[str, torch.Tensor] = {}
    for number in range(1, count + 1):
        report = own.step(groups[(number - 1) % len(groups)])
        for name, latest in own.divisors().items():
            divisors[name] = torch.minimum(divisors[name], latest.float()) if name in divisors else latest.float()
        parameters, smallest = (dict(own.model.named_parameters()), divisors) if number in kept else ({}, {})
        yield State(copy.deepcopy(named(parameters)), copy.deepcopy(named(smallest)), report)
