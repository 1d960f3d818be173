"""Names that come from data: what a recipe or a folder may call things.

A loss graph is generated Python, and TorchScript after that, so its inputs and parameters become variables there. A
recipe is data and must not become code: every name in one goes through :func:`check` when a composition is made, and
those that become variables through :func:`check_variable` once more, where the graph is built.
"""

import builtins
import keyword
import re
from collections.abc import Iterable

MAX_LENGTH = 200  # of a name in an artefact; cpp/runtime/signature/ refuses longer ones
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)
# Words that mean something else in the code of a graph: to Python, to torch.fx, or to TorchScript, which renames an
# argument that has one of them when it is saved (reserved_names in its printer).
_TAKEN = frozenset(
    [
        *keyword.kwlist,
        *dir(builtins),
        *("self", "torch", "device", "fx_pytree", "pytree", "NoneType"),
        *("aten", "attribute", "CONSTANTS", "fork", "inf", "infj", "nan", "nanj", "ops"),
        *("uninitialized", "unchecked_cast"),
    ]
)


def check(name: object, what: str) -> str:
    """``name``, if it is an identifier; ``what`` says in the message whose name it is."""
    if (
        not isinstance(name, str)
        or len(name) > MAX_LENGTH
        or not _IDENTIFIER.fullmatch(name)
        or keyword.iskeyword(name)
    ):
        raise ValueError(
            f"expected {what} to be a name of at most {MAX_LENGTH} ASCII letters, digits and underscores that starts "
            f"with a letter and is no word of Python, got {_shown(name)}; choose another"
        )
    return name


def check_variable(name: object, what: str, used: Iterable[str] = ()) -> str:
    """The same for a name that becomes a variable in the code of a graph, which uses the names ``used`` itself."""
    checked = check(name, what)
    if checked in _TAKEN or checked in used:
        raise ValueError(
            f"expected {what} to be a name without a meaning of its own in Python or TorchScript, got {name!r}; "
            "choose another"
        )
    return checked


def _shown(name: object) -> str:
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    return repr(name) if len(name) <= MAX_LENGTH else f"{name[:40]!r}… of {len(name)} characters"
