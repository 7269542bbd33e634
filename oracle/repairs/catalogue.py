"""Every repair, narrow ones first: of two that undo a difference alike, the first is named and the other a tie."""

from oracle.repairs import configuration, wiring
from oracle.repairs.decode import decoding
from oracle.repairs.ops import operators
from oracle.repairs.repair import Repair
from oracle.repairs.text import conversations, normalization, vocabulary
from oracle.repairs.training import training
from oracle.repairs.weights import misread, parameters

REPAIRS: tuple[Repair, ...] = (
    *vocabulary.REPAIRS,
    *normalization.REPAIRS,
    *conversations.REPAIRS,
    *parameters.REPAIRS,
    *misread.REPAIRS,
    *configuration.REPAIRS,
    *operators.REPAIRS,
    *wiring.REPAIRS,
    *training.REPAIRS,
    *decoding.REPAIRS,
)
