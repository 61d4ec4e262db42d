"""The cluster's token: a secret that every process of a cluster knows, proven on each link and never sent.

It comes from ``RAY_AUTH_TOKEN``, else from the file that ``RAY_AUTH_TOKEN_PATH`` names, else from
``~/.ray/auth_token``, which is made at the first start with mode 0600.
"""

from __future__ import annotations

import os

TOKEN_ENVIRONMENT_VARIABLE = "RAY_AUTH_TOKEN"
TOKEN_PATH_ENVIRONMENT_VARIABLE = "RAY_AUTH_TOKEN_PATH"
MODE_ENVIRONMENT_VARIABLE = "RAY_AUTH_MODE"


def default_token_path() -> str:
    """``~/.ray/auth_token``."""
    return os.path.join(os.path.expanduser("~"), ".ray", "auth_token")


def _check_mode() -> None:
    mode = os.environ.get(MODE_ENVIRONMENT_VARIABLE, "token")
    if mode != "token":
        raise NotImplementedError(
            f"{MODE_ENVIRONMENT_VARIABLE}={mode} is not built: every link between nodes is authenticated by token"
        )


def _read(path: str) -> str:
    with open(path) as file:
        token = file.read().strip()
    if not token:
        raise ValueError(f"the token file {path} is empty")
    return token


def load_token() -> str | None:
    """The token, or None where there is none yet.

    Raises:
        FileNotFoundError: ``RAY_AUTH_TOKEN_PATH`` names a file that is not there.
        ValueError: the token is empty.
        NotImplementedError: ``RAY_AUTH_MODE`` asks for something else than a token.

    Example:
        >>> os.environ["RAY_AUTH_TOKEN"] = "secret"
        >>> load_token()
        'secret'
    """
    _check_mode()
    if TOKEN_ENVIRONMENT_VARIABLE in os.environ:
        token = os.environ[TOKEN_ENVIRONMENT_VARIABLE].strip()
        if not token:
            raise ValueError(f"{TOKEN_ENVIRONMENT_VARIABLE} is set and empty")
        return token
    if path := os.environ.get(TOKEN_PATH_ENVIRONMENT_VARIABLE):
        return _read(path)
    path = default_token_path()
    try:
        if os.stat(path).st_mode & 0o077:
            os.chmod(path, 0o600)
        return _read(path)
    except FileNotFoundError:
        return None


def create_token_file(path: str | None = None) -> str:
    """Makes the token file unless it is there, and returns the token in it.

    Raises:
        OSError: the file cannot be written.
    """
    path = path or default_token_path()
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(os.urandom(32).hex() + "\n")
        try:
            # A link never replaces: of two processes that start at once, both end up with the same token.
            os.link(temporary, path)
        except FileExistsError:
            pass
    finally:
        os.unlink(temporary)
    return _read(path)


def load_or_create_token() -> str:
    """The token; made at the first start. A home that cannot be written gives a token for this session alone.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: as `load_token`.
    """
    token = load_token()
    if token is not None:
        return token
    try:
        return create_token_file()
    except OSError:
        return os.urandom(32).hex()


def fingerprint(token: str, session_name: str) -> str:
    """What a session's files keep of its token: enough to tell a wrong one, useless to anyone else."""
    import hmac

    return hmac.new(token.encode(), b"heliostat session " + session_name.encode(), "sha256").hexdigest()
