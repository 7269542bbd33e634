"""The one exception a user is meant to see."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line and says the remedy.

    The message names what was got, what was expected and what to do. The command
    line prints it as `jaxgpt: <message>` and exits with code 2; nothing has been
    written when it is raised.
    """


def first(items: list[str], shown: int = 3) -> str:
    """`a, b, c (+4 more)`: the head of a list, so that one line stays one line."""
    rest = len(items) - shown
    printable = [item if item.isprintable() else repr(item) for item in items[:shown]]
    printable = [item if len(item) <= 100 else f"{item[:99]}…" for item in printable]
    return ", ".join(printable) + (f" (+{rest} more)" if rest > 0 else "")
