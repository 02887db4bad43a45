"""What the ops chose last, and why: ``legato.explain()``."""

_last: dict[str, tuple[str, str]] = {}


def record(op: str, choice: str, why: str) -> None:
    """Remember the choice that ``op`` made at its latest call."""
    _last[op] = (choice, why)


def explain() -> str:
    """The backend or method that each op used at its latest call in this process, one line an op, and why.

    Example:
        >>> import torch, legato
        >>> _ = legato.linear_recurrence(torch.rand(1, 8, 2), torch.rand(1, 8, 2), backend="reference")
        >>> print(legato.explain())
        linear_recurrence: reference (named by the caller)
    """
    return "\n".join(f"{op}: {choice} ({why})" for op, (choice, why) in sorted(_last.items())) or "no op has run yet"
