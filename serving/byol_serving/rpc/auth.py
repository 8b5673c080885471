"""Who may call what: bearer tokens with scopes, and their rates.

A call carries `authorization: Bearer TOKEN`. Health checks and reflection need none.
"""

import asyncio

from byol_serving.errors import Forbidden, Unauthenticated
from byol_serving.tokens import Scope, Token, Tokens

AUTHORIZATION_KEY = "authorization"

# By how a method's name begins. What fits neither needs `admin`: a new method is closed, not open.
_READS = (
    "Calibrate",
    "Classify",
    "Embed",
    "Extract",
    "Find",
    "Get",
    "List",
    "Model",
    "Search",
    "Server",
    "Verify",
)
_WRITES = ("Create", "Delete", "Drop", "Set", "Upsert")


def scope_of(method: str) -> Scope:
    """What a method needs; `method` is as gRPC has it, /byol.v1.Embedder/Embed."""
    service, _, name = method.rpartition("/")
    if service.endswith(".Admin"):
        return "admin"
    if name.startswith(_READS):
        return "read"
    return "write" if name.startswith(_WRITES) else "admin"


class Gate:
    """Lets calls in; for `Calls`."""

    def __init__(self, tokens: Tokens | None) -> None:
        """Without tokens everybody may do everything."""
        self._tokens = tokens

    def admit(self, method: str, authorization: str | bytes | None) -> Token | None:
        """Whose call it is; None where no tokens are asked for.

        Raises:
            Unauthenticated: no token, or one that is not known.
            Forbidden: its scopes do not include what the method needs.
            Overloaded: over its rate.
        """
        if self._tokens is None:
            return None
        kind, _, secret = str(authorization or "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise Unauthenticated(
                "this server asks for a token; send the metadata 'authorization: Bearer TOKEN'"
            )
        token = self._tokens.find(secret.strip())
        if (scope := scope_of(method)) not in token.scopes:
            raise Forbidden(
                f"token {token.name!r} has the scopes {', '.join(sorted(token.scopes))}, and"
                f" {method} needs {scope}; use another token"
            )
        self._tokens.charge(token)
        return token

    async def pace(self, token: Token | None) -> None:
        """Waits until the token has room for one more message of a stream."""
        if self._tokens is None or token is None:
            return
        # The wait is known beforehand: there is no event to wait for.
        while (wait := self._tokens.spend(token)) > 0:  # noqa: ASYNC110
            await asyncio.sleep(wait)
