"""What every form of the answer says in the same words: how large, what the cause is, how it was proved."""

from collections.abc import Sequence

from oracle.results import CONFIG_FIELD, UNKNOWN, Cause, Finding, Report, layer_of


def kl(report: Report) -> float | None:
    """The largest KL per token in nats, where it was measured."""
    return next((f.error for rung in report.rungs for f in rung.findings if f.op == "kl"), None)


def size(rung: str, found: Finding) -> str:
    """How large a difference is, against its limit, or what is wrong instead."""
    if found.problem:
        return sentence(found.problem)
    kind = "Local error" if rung == "operators" else "Error"
    ratio, limit = found.ratios[found.measure], found.threshold[found.measure]
    size = f"{kind} {found.error:.2g}, {ratio:.2g} times the noise ({MEASURES[found.measure]}; limit {limit:.2g})."
    return f"{sentence(values(found))} {size}" if found.values else size


def values(found: Finding) -> str:
    """The two numbers, where there are only two."""
    return f"{found.values[0]:.6g}, the reference has {found.values[1]:.6g}" if found.values else ""


MEASURES = ("whole tensor", "worst position")
"""What the two ratios of a finding are called."""


def sentence(text: str) -> str:
    """With a capital first, unless that is a name such as a file's, and a full stop last."""
    is_word = text.partition(" ")[0].strip(",:;").replace("-", "").isalpha()
    return (text[:1].upper() if is_word else text[:1]) + text[1:] + ("" if text.endswith((".", "…", "!", "?")) else ".")


def is_parameter(rung: str, found: Finding) -> bool:
    """The finding is about a parameter, its gradient or its update; its op is the parameter's leaf."""
    if not found.tap and not found.op:
        return False
    return rung == "bits" or (rung != "operators" and found.op in ("kernel", "weight", "bias"))


CLAIMS = {
    "text.encode": "the ids of plain text",
    "text.user": "the ids of what people type",
    "text.decode": "the text of ids",
    "text.specials": "the special tokens",
    "text.parse": "the ids of text in which special tokens are spelled",
    "text.template": "the ids of a conversation",
    "text.mask": "which ids of a conversation are trained",
    "text.bos": "the ids that a prompt begins with",
    "text.stops": "the ids that end a reply",
}
"""What each place of the rung ids is about."""
TOKENIZERS = {
    "the reference": "the reference folder's tokenizer",
    "the export": "the tokenizer of its own export",
    "GPT-2's files": "GPT-2's published vocabulary",
    "the rule of kind char": "the rule of a character vocabulary, written a second time",
    "the saved state": "the checkpoint's own tokenizer_state.json",
}
"""What a text side is compared with."""


def kind(rung: str, found: Finding) -> str:
    """What a place is: a parameter, a config field, an op by its function; nothing for a tap that is not there."""
    if found.tap in CLAIMS:
        return CLAIMS[found.tap]
    if is_parameter(rung, found):
        return "a parameter"
    if found.tap.startswith(CONFIG_FIELD):
        return "a config field"
    return f"op {found.op}" if found.op else ""


def place(rung: str, found: Finding) -> str:
    """The tap, or the parameter by its whole name, which the tap is in some rungs."""
    if is_parameter(rung, found) and not found.tap.endswith(f".{found.op}"):
        return f"{found.tap}.{found.op}".strip(".")
    return found.tap or f"the rung {rung}"


def where(found: Finding) -> str:
    """Probe, step or index; of a parameter, the file it was compared with, and of text what it was compared with."""
    if found.tap == "text.stops":
        return "against the checkpoint's and the folder's files"
    if found.tap in CLAIMS:
        against = TOKENIZERS.get(found.where)
        return f"against {against}" if against else f"conversation with {found.where}"
    files = {"reference": "against the reference's file", "export": "against its own export"}
    return files.get(found.where, found.where)


def cause_place(cause: Cause) -> str:
    """Where it begins, and in which dtype if not in the candidate's own."""
    return place(cause.rung, cause.before) + (f" in {cause.seen_in}" if cause.seen_in else "")


def hidden(cause: Cause) -> str:
    """What a place in another dtype means, or nothing."""
    words = "The model's own dtype hides it there behind its rounding; in {} it begins in the rung {}."
    return words.format(cause.seen_in, cause.rung) if cause.seen_in else ""


def proof(cause: Cause) -> str:
    """What the repair did to the error, in one sentence."""
    before, after = cause.before, cause.after
    if cause.name == UNKNOWN:
        return "No known repair undoes it."
    if before.problem and not before.noise and (before.error in (0.0, float("inf")) or after.error == before.error):
        return sentence(f"{cause.change}{',' if ',' in cause.change else ''} this is gone: {before.problem}")
    # A change that is told in two parts is parted from what it does.
    colon = ":" if "," in cause.change else ""
    falls = f"{cause.change}{colon} the error falls from {before.error:.2g} to {after.error:.2g}"
    if before.noise:
        ratios = before.ratios[before.measure], after.ratios[before.measure]
        falls += f", from {ratios[0]:.2g} to {ratios[1]:.2g} times the noise"
    return sentence(falls)


LOOK = {
    "ids": "jaxgpt/tokenizer.py and jaxgpt/chat.py",
    "bits": "jaxgpt/weights.py, the table of names and layouts, and the importer jaxgpt/formats/hf.py",
    "statistics": "the file the weights came from, and jaxgpt/weights.py",
    "operators": "the function of this op in jaxgpt/ops.py, the parameters and the config fields that it reads",
    "forward": "jaxgpt/taps.py, which says what each op reads: by itself every op is right",
    "loss": "jaxgpt/loss.py, and the targets and masks of jaxgpt/data/batches.py",
    "gradients": "jaxgpt/train_step.py: dropout, accumulation and what the loss is divided by",
    "optimizer": "jaxgpt/optimizer.py: schedule, clipping and decay",
    "decode": "jaxgpt/cache.py and the cached forward of jaxgpt/model.py: without a cache the model is right",
    "golden": "what changed since golden.json was written, weights or settings: the model is right as it is now",
}
"""Where to look when all that is known is the rung that broke first."""


def look(cause: Cause) -> str:
    """Where to look for a cause that has no name; empty where nothing is known."""
    if cause.tap.startswith(CONFIG_FIELD):
        return "jaxgpt/config.py and jaxgpt/formats/hf.py, which read config.json, and the checkpoint's model.json"
    return LOOK.get(cause.rung, "")


def standing(cause: Cause) -> str:
    """How sure the name is: `proved`, `not proved`, `tied` or `unknown`."""
    if cause.name == UNKNOWN:
        return UNKNOWN
    if cause.tied:
        return "tied"
    return "proved" if cause.proved else "not proved"


def reservation(cause: Cause) -> str:
    """What keeps the name from being certain, or nothing."""
    return {
        "tied": "Other repairs undo it as well; which of them it is, this run cannot tell.",
        "not proved": "Not proved: with the repair in place, the whole model still differs here.",
    }.get(standing(cause), "")


def beyond(place: str, reason: str) -> str:
    """Where in a sequence nothing was examined."""
    return f"Nothing is said of {place}: {reason}."


def agree(rungs: int) -> tuple[str, str]:
    """What goes around the names of so many rungs."""
    return (". The rung ", " agrees.") if rungs == 1 else (". The rungs ", " agree.")


def repaired(report: Report) -> str:
    """Under which condition the rungs of `Report.repaired` were climbed."""
    if any(cause.name == UNKNOWN for cause in report.causes):
        return "With the reference's own in place of what is unknown"
    return "With the repair" if len(report.causes) == 1 else f"With these {len(report.causes)} repairs"


def places(cause: Cause) -> tuple[list[str], list[str]]:
    """Further places of the cause: in its own rung, and those in other rungs, which its repair sets right as well."""
    own = [place for place in cause.also_at if "(rung " not in place]
    return own, [place for place in cause.also_at if place not in own]


LOCAL = ("bits", "statistics", "operators")
"""Rungs in which a place is wrong by itself, whatever came before it."""


def layers(report: Report, cause: Cause) -> str:
    """In which of the model's layers the cause is, where it is in one and that can be told."""
    config = report.environment.get("config")
    total = config.get("num_hidden_layers") if isinstance(config, dict) else None
    own, _ = places(cause)
    wrong = sorted({layer for layer in map(layer_of, (cause.tap, *own)) if layer is not None})
    if cause.rung not in LOCAL or not wrong or not isinstance(total, int) or total < 2:
        return ""
    alone = _one_kind(cause, own) if len(wrong) > 1 else ""
    if len(wrong) == total:
        return f"all {total}{alone}"
    return f"{'only ' if len(wrong) == 1 else ''}{', '.join(map(str, wrong))} of 0 to {total - 1}{alone}"


def _one_kind(cause: Cause, own: Sequence[str]) -> str:
    """Where parameters of one kind are wrong in several layers, that the layers' others are right."""
    kinds = {place.split(".", 2)[-1] for place in (cause.tap, *own)}
    return f", but of their parameters {kinds.pop()} alone" if cause.rung == "bits" and len(kinds) == 1 else ""


def quoted(names: Sequence[str]) -> list[str]:
    """Names that hold a comma, in a list that is parted by commas."""
    return [f'"{name}"' if "," in name else name for name in names]


def first(names: Sequence[str], shown: int) -> str:
    """`a, b (+3 more)`."""
    more = f" (+{len(names) - shown} more)" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
