"""Every repair, narrow ones first: of two that undo a difference alike, the first is named and the other a tie."""

from oracle.repairs import (
    configuration,
    conversations,
    decoding,
    misread,
    normalization,
    operators,
    parameters,
    text,
    training,
    wiring,
)
from oracle.repairs.repair import Repair

REPAIRS: tuple[Repair, ...] = (
    *text.REPAIRS,
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
